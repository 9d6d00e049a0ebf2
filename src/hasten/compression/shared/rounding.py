"""Rounding layer by layer: the walk of a quantiser that looks at inputs.

Each matrix is put on the grid, and what it then computes is what later matrices are given, so that they answer for it.
How far its outputs are off on the calibration text, ||X (W - Q)||^2 / ||X W||^2, is noted.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from hasten.compression.shared.layerwise import Group, Inputs, Summing
from hasten.compression.shared.quantiser import Integers
from hasten.model.grid import ROWS, Grid, Grids, dequantise


class Rounding(Summing):
    """grid: of all matrices, or of each; those that have none stay as they are. integers: by tensor name. errors: by
    matrix.
    """

    def __init__(self, grid: Grid | Grids) -> None:
        self.grid = grid
        self.integers: dict[str, Integers] = {}
        self.errors: dict[str, float] = {}

    def settle(self, group: Group, inputs: Inputs) -> None:
        for name, linear in zip(group.names, group.linears, strict=True):
            if not self.grid.covers(name):
                continue
            weight = linear.weight.detach()
            q, scale = self.rounded(name, weight, inputs)
            lost = whole = 0.0
            for part, *rounded in zip(*(matrix.split(ROWS) for matrix in (weight, q, scale)), strict=True):
                kept = dequantise(*rounded)
                lost += output_error(part - kept, inputs.gram)
                whole += output_error(part, inputs.gram)
                if group.block is not None:  # what the head says nobody is given, and it may be the embedding
                    part.copy_(kept)
            self.errors[name] = round(lost / whole, 6) if whole else 0.0
            self.integers[f"{name}.weight"] = q, scale

    @abstractmethod
    def rounded(self, name: str, weight: Tensor, inputs: Inputs) -> Integers:
        """A matrix on the grid."""


def output_error(difference: Tensor, gram: Tensor) -> float:
    """||X D^T||^2, summed over the text: difference D (out, in), gram X^T X (in, in)."""
    return float(((difference @ gram.to(difference.dtype)) * difference).sum(dtype=torch.float64))
