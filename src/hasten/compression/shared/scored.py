"""Weights by what they add to an output: the masks of Wanda (`hasten.compression.wanda`)."""

from __future__ import annotations

from torch import Tensor

from hasten.compression.shared.layerwise import Group, Treatment
from hasten.compression.shared.sparsity import Sparsifier
from hasten.model.grid import by_rows


class Scored(Treatment):
    """squares: of each input's values over the tokens seen, (in,) float64."""

    def __init__(self, options: Sparsifier) -> None:
        self.options = options
        self.squares: Tensor | None = None

    def see(self, x: Tensor) -> None:
        seen = x.double().square_().sum(0)
        self.squares = seen if self.squares is None else self.squares + seen

    def treat(self, group: Group) -> None:
        assert self.squares is not None
        lengths, self.squares = self.squares.sqrt(), None
        for linear in group.linears:
            mask = by_rows(lambda rows: self.options.smallest(rows.abs().double() * lengths), linear.weight)
            linear.weight.masked_fill_(mask, 0)
