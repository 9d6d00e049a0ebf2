"""What a network loses if some of its matrices alone are rounded: how far its predictions move on calibration text.

Measured as the KL divergence of the next token's distribution from the float network's, in nats per token. What comes
before the rounded matrices is computed once for all, so a measurement is half a pass on average. In memory are the
network and, for `AT_ONCE` rows of text, the states before each block and the float network's distributions; rounded
weights and other distributions exist some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.compression.shared.layerwise import Group, view
from hasten.model.grid import ROWS, Grid, dequantise, quantise

if TYPE_CHECKING:
    from hasten.compression.base import Calibration
    from hasten.model.decoder import Decoder

Scales = Mapping[str, Tensor]
"""Of matrices by name, (out, groups)."""
AT_ONCE = 2
"""Rows of text whose distributions over the vocabulary are in memory together."""
TOKENS = 64
"""Tokens whose distributions are computed with at once."""


@torch.no_grad()
def divergences(
    model: Decoder, text: Calibration, units: Sequence[Group], scales: Mapping[Grid, Scales]
) -> list[dict[int, float]]:
    """By how many nats per token predictions move if a unit alone is rounded, unit by unit and by bits."""
    places = {id(layer): place for place, layer in enumerate(model.model.layers)}
    sums: list[dict[int, float]] = [{grid.bits: 0.0 for grid in scales} for _ in units]
    tokens = 0
    for start in range(0, len(text.ids), AT_ONCE):
        rows = Rows(model, text, slice(start, start + AT_ONCE))
        before = torch.cat([logits.log_softmax(-1) for logits in rows.predictions(len(places))])
        tokens += len(before)
        for unit, total in zip(units, sums, strict=True):
            for grid, of in scales.items():
                with rounded(model, unit, of, grid):
                    after = rows.predictions(places.get(id(unit.block), len(places)))
                    pairs = zip(before.split(TOKENS), after, strict=True)
                    total[grid.bits] += sum(divergence(old, new.log_softmax(-1)) for old, new in pairs)
    return [{bits: max(0.0, value / max(1, tokens)) for bits, value in total.items()} for total in sums]


def divergence(before: Tensor, after: Tensor) -> float:
    """KL(before || after) of distributions, (tokens, vocabulary) log-probabilities, summed over tokens; takes `after`
    for its own.
    """
    return float(torch.sub(before, after, out=after).mul_(before.exp()).sum(dtype=torch.float64))


class Rows:
    """Some rows of text in a network: the states before each block and behind the last, (N, T, hidden)."""

    def __init__(self, model: Decoder, text: Calibration, part: slice) -> None:
        stack = model.model
        self.model, self.counts = model, text.weights[part, 1:] > 0  # what predicts a token that counts
        views = {slides: view(model, text, part, slides) for slides in set(stack.slides)}
        self.blocks = [(block, views[slides]) for block, slides in zip(stack.layers, stack.slides, strict=True)]
        self.states = [stack.embed(text.ids[part])]
        for block, seen in self.blocks:
            self.states.append(block(self.states[-1], seen, None))

    def predictions(self, place: int) -> Iterator[Tensor]:
        """Logits (tokens, vocabulary), some tokens at a time, with the blocks from `place` on as they are now."""
        x = self.states[place]
        for block, seen in self.blocks[place:]:
            x = block(x, seen, None)
        for part in self.model.model.norm(x)[:, :-1][self.counts].split(TOKENS):
            yield self.model.lm_head(part)


class Rounded(nn.Module):
    """A matrix as it would be on a grid, rounded whenever it is used, some rows at a time: nobody holds it twice."""

    def __init__(self, whole: nn.Linear, scale: Tensor, grid: Grid) -> None:
        super().__init__()
        self.whole, self.scale, self.grid = whole, scale, grid

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.whole.weight.split(ROWS), self.scale.split(ROWS), strict=True)
        y = torch.cat([F.linear(x, dequantise(quantise(rows, scale, self.grid), scale)) for rows, scale in parts], -1)
        return y if self.whole.bias is None else y + self.whole.bias


@contextmanager
def rounded(model: Decoder, unit: Group, scales: Scales, grid: Grid) -> Iterator[None]:
    """The unit's matrices on the grid, as long as this lasts."""
    try:
        for name, linear in zip(unit.names, unit.linears, strict=True):
            model.set_submodule(name, Rounded(linear, scales[name], grid))
        yield
    finally:
        for name, linear in zip(unit.names, unit.linears, strict=True):
            model.set_submodule(name, linear)
