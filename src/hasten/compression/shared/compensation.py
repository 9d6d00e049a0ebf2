"""Columns that make up for each other's errors: the linear algebra of GPTQ (`hasten.compression.gptq`).

With H = X^T X, the output's squared error is a quadratic form of the weights' errors. Round column j and let the
columns R that are still free move to where that form is smallest: they move by -e_j [H_F^-1]_jR / [H_F^-1]_jj, F being
j and R. Rounding always in the same order, all those inverses are in one matrix, U, upper triangular with U^T U = H^-1:
the move is -e_j U_jR / U_jj (Frantar et al. 2022, arXiv:2210.17323, step 3). Moves reach the rest of the matrix a
block of 128 columns at a time, as memory likes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.compression.shared.layerwise import Group, Inputs
from hasten.compression.shared.quantiser import Integers, Scale, chosen_scale
from hasten.compression.shared.rounding import Rounding
from hasten.model.grid import ROWS, Grid, Grids, by_rows

BLOCK = 128
"""Columns whose errors reach the rest of the matrix together."""


class Compensating(Rounding):
    """Rounds every matrix that way. raised: by group, the damping it took where the one asked for was too little."""

    def __init__(self, grid: Grid | Grids, how: Scale, *, damping: float, act_order: bool) -> None:
        super().__init__(grid)
        self.how, self.damping, self.act_order = how, damping, act_order
        self.raised: dict[str, float] = {}

    def settle(self, group: Group, inputs: Inputs) -> None:
        diagonal = inputs.gram.diagonal()
        columns = torch.arange(len(diagonal))
        self.order = diagonal.argsort(descending=True, stable=True) if self.act_order else columns
        self.factor, damping = inverse_factor(inputs.gram, self.damping, self.order)
        if damping > self.damping:
            self.raised[group.names[0]] = damping
        super().settle(group, inputs)
        del self.factor

    def rounded(self, name: str, weight: Tensor, inputs: Inputs) -> Integers:
        grid, order = self.grid.of(name), self.order
        scale = chosen_scale(weight, grid, self.how, inputs.gram.diagonal())

        def integers(weight: Tensor, scale: Tensor) -> Tensor:
            return compensated(weight, scale, self.factor, order, grid)

        return by_rows(integers, weight, scale, rows=ROWS), scale


def inverse_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """U with U^T U = (H + damping * its mean diagonal)^-1, upper triangular, and the damping that it took. order: of
    H's rows and columns, (in,), if it is to be another one.

    With the rows and columns of H in reverse order its Cholesky factor, reversed again, is U^-1. At no time are there
    more than two matrices beside H.
    """

    def ordered() -> Tensor:
        return gram if order is None else gram[order[:, None], order]

    own = ordered().diagonal()
    own, mean = own.clone(), own.mean()
    while True:
        diagonal = own + damping * mean
        diagonal[own == 0] = 1  # never used, so alone in their rows: any value will do
        matrix = ordered().flip(0, 1)
        matrix.diagonal().copy_(diagonal.flip(0))
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = matrix.flip(0, 1)
            inverse = torch.eye(len(gram), dtype=gram.dtype).T  # in the order of LAPACK, which overwrites it
            return torch.linalg.solve_triangular(matrix, inverse, upper=True, out=inverse), damping
        damping = max(10 * damping, 1e-6)


def compensated(weight: Tensor, scale: Tensor, factor: Tensor, order: Tensor, grid: Grid) -> Tensor:
    """Integers of a matrix (out, in), its columns taken in that order; the factor is of H in the same order."""
    columns = weight.shape[1]
    left, steps = weight.T[order].double(), scale.T.double()  # (in, out), (groups, out)
    group = (order // (columns // len(steps))).tolist()
    q = torch.empty_like(left, dtype=torch.int8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            step = steps[group[j]]
            rounded = (left[j] / step).round().clamp(grid.lowest, grid.highest)
            errors[j - start] = (left[j] - rounded * step) / factor[j, j]
            q[j] = rounded
            left[j:end].addr_(factor[j, j:end], errors[j - start], alpha=-1)
        left[end:] -= factor[start:end, end:].T @ errors
    result = torch.empty_like(q)
    result[order] = q
    return result.T.contiguous()
