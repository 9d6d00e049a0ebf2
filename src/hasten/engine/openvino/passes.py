"""Which tokens of which requests one pass computes: continuous batching (Yu et al. 2022, OSDI).

Requests do not wait for each other: a pass takes the newest token of every sequence under way and fills up with
prompts, cut where it is full. A sequence owns the blocks of its slot, so keys and values never move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hasten.engine.openvino.graph import BLOCK
from hasten.engine.sampling import probabilities
from hasten.engine.streaming import Flight

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Generator


@dataclass(eq=False)
class Sequence:
    """A request in a slot. ids: prompt and what was generated. cached: of how many the slot holds keys and values."""

    flight: Flight
    slot: int
    ids: list[int]
    cached: int = 0
    generator: Generator | None = None

    @property
    def waiting(self) -> int:
        """Tokens to be computed until the next one is known."""
        return len(self.ids) - self.cached

    def draw(self, logits: NDArray[np.float32]) -> int | None:
        """The next token, or None if the logits that decide it are not finite. logits: (vocabulary,)."""
        token, request = int(logits.argmax()), self.flight.request
        if not np.isfinite(logits[token]):  # argmax stops at the first NaN
            return None
        if not request.temperature:
            return token
        import torch

        if self.generator is None:
            self.generator = torch.Generator().manual_seed(request.seed)
        shares = probabilities(torch.from_numpy(logits), request.temperature, request.top_p)
        return int(torch.multinomial(shares, 1, generator=self.generator))


@dataclass
class Pass:
    """Sequences, and how many tokens of each are computed together. ready: those whose next token is known after it."""

    parts: list[tuple[Sequence, int]] = field(default_factory=list)

    @classmethod
    def of(cls, sequences: Iterable[Sequence], most: int) -> Pass:
        """The shortest first: sequences that go on before prompts, of equal ones the oldest. most: tokens of a pass."""
        parts: list[tuple[Sequence, int]] = []
        for sequence in sorted(sequences, key=lambda one: one.waiting > 1):
            count = min(sequence.waiting, most)
            if count:
                parts.append((sequence, count))
                most -= count
        return cls(parts)

    @property
    def ready(self) -> list[Sequence]:
        return [sequence for sequence, count in self.parts if count == sequence.waiting]

    def inputs(self, blocks: int) -> dict[str, NDArray[np.int32]]:
        """The inputs of `graph.Graph.model`. blocks: how many a slot has."""
        ids: list[int] = []
        positions: list[int] = []
        indices: list[int] = []
        begins, block_begins, wanted = [0], [0], []
        for sequence, count in self.parts:
            end = sequence.cached + count
            ids += sequence.ids[sequence.cached : end]
            positions += range(sequence.cached, end)
            begins.append(len(ids))
            first = sequence.slot * blocks
            indices += range(first, first - -end // BLOCK)
            block_begins.append(len(indices))
            if count == sequence.waiting:
                wanted.append(len(ids) - 1)
        values = {
            "input_ids": ids,
            "position_ids": positions,
            "past_lens": [sequence.cached for sequence, _ in self.parts],
            "subsequence_begins": begins,
            "block_indices": indices,
            "block_indices_begins": block_begins,
            "max_context_len": max(sequence.cached + count for sequence, count in self.parts),
            "wanted": wanted,
        }
        return {name: np.array(value, np.int32) for name, value in values.items()}
