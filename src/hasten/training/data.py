"""What a training step sees: batches as a pure function of (seed, index).

Because batch `i` depends on nothing but the seed and `i`, a run that resumes at step `k` sees
exactly what an uninterrupted run would have seen, and no sampler state has to be trusted.

A batch is `{"ids": (B, T) int64, "weights": (B, T) float32, "prompt_tokens": (B,) int64}`: weights[b, t]
is how much the loss of predicting ids[b, t] from the tokens before it counts (0 for padding and for
position 0); the first prompt_tokens[b] ids are what an encoder-decoder reads with its encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hasten.artifacts import Tokens
from hasten.errors import UserError

Batch = dict[str, Tensor]


class PackedTokens(Dataset[Batch]):
    """Pre-training batches: the token stream cut into sequences, shuffled anew every epoch."""

    def __init__(self, tokens: Tokens, split: str, *, batches: int, batch_size: int, length: int, seed: int) -> None:
        self.ids = tokens.ids(split)
        self.batches, self.batch_size, self.length, self.seed = batches, batch_size, length, seed
        self.sequences = len(self.ids) // length
        if self.sequences < 1:
            raise UserError(
                f"training.sequence_length must fit the {split} split, got {length} for {len(self.ids)} tokens"
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.batches

    def sequence(self, index: int) -> int:
        """Which sequence the index-th draw is: a permutation per epoch."""
        epoch, place = divmod(index, self.sequences)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.sequences))
        return int(self._order[1][place])

    def __getitem__(self, index: int) -> Batch:
        starts = [self.sequence(index * self.batch_size + row) * self.length for row in range(self.batch_size)]
        ids = np.stack([self.ids[start : start + self.length] for start in starts]).astype(np.int64)
        weights = torch.ones(ids.shape)
        weights[:, 0] = 0
        # Where an encoder-decoder hands over: anywhere in the first half, so that most tokens are predicted.
        splits = np.random.default_rng((self.seed, 1, index)).integers(1, self.length // 2 + 1, self.batch_size)
        return {"ids": torch.from_numpy(ids), "weights": weights, "prompt_tokens": torch.from_numpy(splits)}


@dataclass(frozen=True)
class Example:
    """A task item as token ids; the first `prompt_tokens` of them are the prompt."""

    ids: tuple[int, ...]
    prompt_tokens: int


class TaskBatches(Dataset[Batch]):
    """Fine-tuning batches: items of like length together, so that little is computed on padding.

    Each epoch shuffles the items, sorts stretches of `pool` batches by length, cuts them into
    batches and shuffles those.
    """

    pool = 32

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        prompt_weight: float,
        pad_id: int,
    ) -> None:
        if not examples:
            raise UserError("fine-tuning needs at least one training item, got none")
        self.examples, self.epochs, self.batch_size = examples, epochs, batch_size
        self.seed, self.prompt_weight, self.pad_id = seed, prompt_weight, pad_id
        self.per_epoch = -(-len(examples) // batch_size)
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, as indices of examples."""
        if self._plan[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(len(self.examples))
            lengths = np.array([len(example.ids) for example in self.examples])
            stretch = self.pool * self.batch_size
            pools = [order[start : start + stretch] for start in range(0, len(order), stretch)]
            order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
            batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
            self._plan = (epoch, [batches[i] for i in generator.permutation(len(batches))])
        return self._plan[1]

    def __getitem__(self, index: int) -> Batch:
        epoch, place = divmod(index, self.per_epoch)
        return padded([self.examples[i] for i in self.plan(epoch)[place]], self.prompt_weight, self.pad_id)


def padded(examples: Sequence[Example], prompt_weight: float, pad_id: int) -> Batch:
    """Examples as one batch, padded on the right (causal attention never looks there)."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.int64)
    weights = torch.zeros(len(examples), longest)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, 1 : example.prompt_tokens] = prompt_weight
        weights[row, example.prompt_tokens : len(example.ids)] = 1.0
    return {"ids": ids, "weights": weights, "prompt_tokens": torch.tensor([one.prompt_tokens for one in examples])}
