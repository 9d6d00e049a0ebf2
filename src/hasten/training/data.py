"""What a training step sees: batches as a pure function of (seed, index).

Because batch `i` depends on nothing but the seed and `i`, a run that resumes at step `k` sees exactly what an
uninterrupted run would have seen, whatever the processes it resumes on, and no sampler state has to be trusted.

A pass is one forward and backward of one process; a step is all processes' passes between two updates of the weights.
A batch is what one pass reads, with shapes (B, T) for B rows of T tokens:

    ids           (B, T) int64
    weights       (B, T) float32: how much the loss of predicting ids[b, t] from the tokens before it counts; 0 for
                  padding, for position 0 and for the first token of a document that is not to be predicted from another
    prompt_tokens (B,) int64: how many ids at the start of a row an encoder-decoder reads with its encoder
    total         () float32: the weights of the whole step, of all its passes together
    documents     (B, T) int32, only where a row may hold several documents that must not see each other: which of its
                  row's documents a token is of; -1 for padding

A pass divides its sum of weighted losses by `total`, so that the passes add up to the step's mean however unequal
they are. All rows of a step are padded to one width, so every share of it computes the same shapes.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from hasten.artifacts import Tokens
from hasten.errors import UserError
from hasten.training.packing import best_fit
from hasten.training.sampling import Mixture, Stretches, rates

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Share:
    """Which rows of each step's batch this process reads in which pass: those of part `accumulated * ranks + rank`.

    ranks: processes that read different data. accumulate: passes per step.
    """

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    def check(self, batch_size: int) -> None:
        """Raises `UserError` unless every part of a batch has equally many rows."""
        if batch_size % (self.ranks * self.accumulate):
            raise UserError(
                f"training.batch_size must be a multiple of training.accumulate ({self.accumulate}) times the "
                f"processes that share a batch ({self.ranks}), got {batch_size}"
            )

    def rows(self, index: int, batch_size: int) -> slice:
        """The rows of pass `index`; it is part of step `index // accumulate`."""
        part = index % self.accumulate * self.ranks + self.rank
        return slice(part, batch_size, self.ranks * self.accumulate)


WHOLE = Share()
"""One process, one pass per step."""
DRAWN_TOGETHER = 4096
"""Rows whose places are computed at once: arithmetic on sixteen numbers takes as long as on a thousand."""


class PackedTokens(Dataset[Batch]):
    """Pre-training batches: the token stream cut into sequences, in an order of its own every epoch.

    steps: optimiser steps. batch_size: rows of a step. length: tokens of a row. mixture: see
    `hasten.training.sampling`; groups of the same rate are drawn from together, and where they are neighbours they are
    cut as one stream. apart: say which document a token is of, and predict no document's first token. encodes_prompt:
    the tokens that an encoder reads are not predicted. even_shares: refuse a batch that gives one share more rows than
    another. Raises `UserError` for that, for a mixture that is none, and if text that is cut by itself is shorter than
    a sequence.

    Nothing is read before it is asked for, and nothing is kept: the system pages the files in and out.
    """

    def __init__(
        self,
        tokens: Tokens,
        split: str,
        *,
        steps: int,
        batch_size: int,
        length: int,
        seed: int,
        mixture: Mapping[str, float] | None = None,
        apart: bool = True,
        encodes_prompt: bool = False,
        share: Share = WHOLE,
        even_shares: bool = True,
    ) -> None:
        if even_shares:
            share.check(batch_size)
        self.tokens, self.split, self.steps, self.batch_size, self.length = tokens, split, steps, batch_size, length
        self.seed, self.apart, self.encodes_prompt, self.share = seed, apart, encodes_prompt, share
        groups = tokens.groups(split)
        rate = rates(mixture or {}, [(group.source, group.language) for group in groups])
        found: dict[float, list[tuple[int, int]]] = {}  # by rate: first token and one past the last of each stretch
        for group in groups:
            stretches, end = found.setdefault(rate[group.source, group.language], []), group.start_token + group.tokens
            if stretches and stretches[-1][1] == group.start_token:
                stretches[-1] = (stretches[-1][0], end)
            else:
                stretches.append((group.start_token, end))
        found.pop(0.0, None)
        for start, end in (one for stretches in found.values() for one in stretches):
            if end - start < length:
                inside = [group.name for group in groups if start <= group.start_token < end]
                where = f"{', '.join(inside)} of the {split} split" if mixture else f"the {split} split"
                raise UserError(f"training.sequence_length must fit {where}, got {length} for {end - start} tokens")
        self.pools = [Stretches.of(stretches, length) for stretches in found.values()]
        self.mixture = Mixture([int(pool.ends[-1]) for pool in self.pools], list(found), seed)
        self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @cached_property
    def ids(self) -> np.ndarray:
        """The split's tokens, (tokens,)."""
        return scattered(self.tokens.ids(self.split))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where documents begin, (documents + 1,)."""
        return scattered(self.tokens.offsets(self.split))

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped files: pickled, they would be copied, and another process maps them itself."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("ids", "offsets")}
        return {**kept, "_drawn": (-1, self._drawn[1][:0])}

    def __len__(self) -> int:
        return self.steps * self.share.accumulate

    def starts(self, step: int) -> np.ndarray:
        """The first token of each of a step's rows, (batch_size,) int64."""
        steps = max(1, DRAWN_TOGETHER // self.batch_size)
        chunk, place = divmod(step, steps)
        if self._drawn[0] != chunk:
            draws = steps * self.batch_size
            pool, sequence = self.mixture.item(chunk * draws + np.arange(draws))
            found = np.empty_like(sequence)
            for number, stretches in enumerate(self.pools):
                own = pool == number
                found[own] = stretches.first_tokens(sequence[own])
            self._drawn = chunk, found.reshape(steps, self.batch_size)
        drawn: np.ndarray = self._drawn[1][place]
        return drawn

    def __getitem__(self, index: int) -> Batch:
        return self.batch(index, self.length)

    def batch(self, index: int, width: int) -> Batch:
        """Batch `index` with rows cut to their first `width` tokens."""
        step, mine = index // self.share.accumulate, self.share.rows(index, self.batch_size)
        starts = self.starts(step)
        # Where an encoder-decoder hands over: anywhere in the first half, so that most tokens are predicted.
        prompts = np.random.default_rng((self.seed, 1, step)).integers(1, width // 2 + 1, self.batch_size)
        first = prompts if self.encodes_prompt else np.ones_like(prompts)  # the first token that counts
        total = int((width - first).sum())
        if self.apart:  # counted for all rows of the step, read for this pass's alone
            total -= int((self.offsets.searchsorted(starts + width) - self.offsets.searchsorted(starts + first)).sum())
        starts, first = starts[mine], first[mine]
        ids = np.empty((len(starts), width), np.int64)
        for row, start in zip(ids, starts.tolist(), strict=True):
            row[:] = self.ids[start : start + width]
        weights = (np.arange(width) >= first[:, None]).astype(np.float32)
        batch = {"ids": torch.from_numpy(ids), "prompt_tokens": torch.from_numpy(prompts[mine].copy())}
        if self.apart:
            begins = self.begins(starts, width)
            weights[begins] = 0
            batch["documents"] = torch.from_numpy(begins.cumsum(axis=1, dtype=np.int32))
        # At least 1: a step in which nothing counts is worth nothing instead of 0 / 0.
        return {**batch, "weights": torch.from_numpy(weights), "total": torch.tensor(float(max(total, 1)))}

    def begins(self, starts: np.ndarray, width: int) -> np.ndarray:
        """Whether a document begins at a token of rows from `starts`, (B, width); never said of a row's first token."""
        first = self.offsets.searchsorted(starts + 1)  # a binary search, which reads a few pages of the file
        counts = self.offsets.searchsorted(starts + width) - first
        rows = np.repeat(np.arange(len(starts)), counts)
        within = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
        marks = np.zeros((len(starts), width), np.bool_)
        marks[rows, self.offsets[first[rows] + within] - starts[rows]] = True
        return marks


def scattered(array: np.ndarray) -> np.ndarray:
    """A mapped file that will be read here and there, as an array that costs less to slice than a map.

    Not told so, Linux reads 128 KiB around each place, which for 512 bytes of a corpus larger than memory is 20 times
    slower (`python benchmarks/input.py`).
    """
    base: object = array.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        base.madvise(mmap.MADV_RANDOM)
    return np.asarray(array)


@dataclass(frozen=True)
class Example:
    """A task item as token ids; the first `prompt_tokens` of them are the prompt."""

    ids: tuple[int, ...]
    prompt_tokens: int
    task: str = ""
    language: str = ""

    def weight(self, prompt_weight: float) -> float:
        """Of all its tokens: 1 for each of the completion, `prompt_weight` for each of the prompt but the first."""
        return prompt_weight * (self.prompt_tokens - 1) + len(self.ids) - self.prompt_tokens


Row = tuple[Example, ...]


class TaskBatches(Dataset[Batch]):
    """Fine-tuning batches: one item per row, items of like length together, so that little is computed on padding.

    steps or epochs: how long, one of them above 0. An epoch is every item once in `steps_per_epoch` steps of exactly
    `batch_size` rows; where that does not come out even, it is filled up with what the next epoch begins with. Within
    an epoch, stretches of `pool` batches are sorted by length, cut into batches, and these shuffled. mixture: by task
    and language, see `hasten.training.sampling`; with rates an epoch is as long, but items of a high rate come in it
    more often than once. encodes_prompt: the prompt's tokens are not predicted, whatever prompt_weight says.
    """

    pool = 32
    apart = False
    """Whether rows hold several items."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int,
        prompt_weight: float,
        pad_id: int,
        steps: int = 0,
        epochs: int = 0,
        mixture: Mapping[str, float] | None = None,
        encodes_prompt: bool = False,
        share: Share = WHOLE,
    ) -> None:
        if not examples:
            raise UserError("fine-tuning needs at least one training item, got none")
        assert (steps > 0) != (epochs > 0)
        share.check(batch_size)
        self.batch_size, self.seed, self.pad_id, self.share = batch_size, seed, pad_id, share
        self.prompt_weight = 0.0 if encodes_prompt else prompt_weight
        rate = rates(mixture or {}, [(example.task, example.language) for example in examples])
        pools: dict[float, list[Example]] = {}
        for example in examples:
            pools.setdefault(rate[example.task, example.language], []).append(example)
        pools.pop(0.0, None)
        packed = [self.packed(pool) for pool in pools.values()]
        self.rows: list[Row] = [row for rows in packed for row in rows]
        self.before = np.cumsum([0, *map(len, packed)])
        self.mixture = Mixture([len(rows) for rows in packed], list(pools), seed)
        self.lengths = np.array([sum(len(example.ids) for example in row) for row in self.rows])
        self.weights = np.array([sum(one.weight(self.prompt_weight) for one in row) for row in self.rows])
        self.steps_per_epoch = -(-len(self.rows) // batch_size)
        self.steps = steps or epochs * self.steps_per_epoch
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

    def packed(self, examples: Sequence[Example]) -> list[Row]:
        """What is a row."""
        return [(example,) for example in examples]

    def __len__(self) -> int:
        return self.steps * self.share.accumulate

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as indices of rows, (batch_size,) each."""
        if self._plan[0] != epoch:
            draws = epoch * len(self.rows) + np.arange(self.steps_per_epoch * self.batch_size)
            pool, item = self.mixture.item(draws)
            order, stretch = self.before[pool] + item, self.pool * self.batch_size
            pools = [order[start : start + stretch] for start in range(0, len(order), stretch)]
            order = np.concatenate([one[np.argsort(self.lengths[one], kind="stable")] for one in pools])
            batches = order.reshape(self.steps_per_epoch, self.batch_size)
            generator = np.random.default_rng((self.seed, epoch))
            self._plan = (epoch, [batches[i] for i in generator.permutation(len(batches))])
        return self._plan[1]

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index // self.share.accumulate, self.steps_per_epoch)
        chosen = self.plan(epoch)[place]
        mine = [self.rows[i] for i in chosen[self.share.rows(index, self.batch_size)]]
        batch = laid_out(mine, self.prompt_weight, self.pad_id, width=int(self.lengths[chosen].max()))
        batch["total"] = torch.tensor(self.weights[chosen].sum(), dtype=torch.float32)
        if not self.apart:
            del batch["documents"]
        return batch


class PackedExamples(TaskBatches):
    """Fine-tuning batches of rows that hold several items, up to `length` tokens, so that hardly anything is padding.

    Which items share a row is settled once (`hasten.training.packing`). They do not see each other (Krell et al. 2021,
    arXiv:2107.02027), and none is cut. batch_size and epochs count rows; a row of several items has no one prompt, so
    its prompt_tokens is 1.
    """

    apart = True

    def __init__(self, examples: Sequence[Example], *, length: int, **options: Any) -> None:
        self.length = length
        super().__init__(examples, **options)

    def packed(self, examples: Sequence[Example]) -> list[Row]:
        for example in examples:
            if len(example.ids) > self.length:
                raise UserError(
                    f"training.sequence_length must fit every item where they are packed, got {self.length} for an "
                    f"item of task {example.task} with {len(example.ids)} tokens"
                )
        bins = best_fit([len(example.ids) for example in examples], self.length)
        return [tuple(examples[i] for i in row) for row in bins]


class Rehearsed(Dataset[Batch]):
    """Batches of tasks with rows of pre-training text beside them: who only answers unlearns to write ("catastrophic
    forgetting", McCloskey and Cohen 1989, doi:10.1016/S0079-7421(08)60536-8; rehearsal: Robins 1995,
    doi:10.1080/09540099550039318).

    share: of the step's weight, how much is text's; its weights are scaled to that. Every step has `text.batch_size`
    rows of text, cut to the tasks' width so that no task is padded for it; with `even_shares=False` they may be fewer
    than the shares.
    """

    def __init__(self, tasks: TaskBatches, text: PackedTokens, share: float) -> None:
        if not 0 < share < 1:
            raise UserError(f"rehearsal must lie between 0 and 1, got {share}")
        assert tasks.share == text.share
        self.tasks, self.text, self.share = tasks, text, share

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> Batch:
        tasks = self.tasks[index]
        text = self.text.batch(index, min(tasks["ids"].shape[1], self.text.length))
        total = tasks["total"] / (1 - self.share)
        text["weights"] *= total * self.share / text["total"]
        return {**stacked(tasks, text, self.tasks.pad_id), "total": total}


def stacked(one: Batch, other: Batch, pad_id: int) -> Batch:
    """The rows of both, those of `other` padded to the width of `one`; with documents if either has them."""
    width, short = one["ids"].shape[1], other["ids"].shape[1]
    filling = {"ids": pad_id, "weights": 0.0}
    if "documents" in one or "documents" in other:
        filling["documents"] = -1
        one, other = ({"documents": torch.zeros_like(each["ids"], dtype=torch.int32), **each} for each in (one, other))
    rows = {
        name: torch.cat([one[name], F.pad(other[name], (0, width - short), value=value)])
        for name, value in filling.items()
    }
    return {**rows, "prompt_tokens": torch.cat([one["prompt_tokens"], other["prompt_tokens"]])}


def padded(examples: Sequence[Example], prompt_weight: float, pad_id: int) -> Batch:
    """Examples as one batch, padded on the right (causal attention never looks there)."""
    batch = laid_out([(example,) for example in examples], prompt_weight, pad_id)
    del batch["documents"]
    return batch


def laid_out(rows: Sequence[Row], prompt_weight: float, pad_id: int, width: int = 0) -> Batch:
    """Rows of one or more examples as one batch, padded on the right to `width` (0: to the longest), with documents.

    `total` is the weight of these rows.
    """
    width = width or max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    weights = torch.zeros(len(rows), width)
    documents = torch.full((len(rows), width), -1, dtype=torch.int32)
    for number, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row):
            prompt, end = start + example.prompt_tokens, start + len(example.ids)
            ids[number, start:end] = torch.tensor(example.ids)
            weights[number, start + 1 : prompt] = prompt_weight
            weights[number, prompt:end] = 1.0
            documents[number, start:end] = document
            start = end
    prompts = torch.tensor([row[0].prompt_tokens if len(row) == 1 else 1 for row in rows])
    return {"ids": ids, "weights": weights, "prompt_tokens": prompts, "documents": documents, "total": weights.sum()}
