"""HQQ: better scales without any data, by a norm that forgives outliers.

A matrix's errors are mostly small with a few large ones, and the mean square, which a searched scale makes small, lets
those few decide. Half-quadratic quantisation (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine
Learning Models") minimises the sum of |w - s q|^p with p < 1 instead, which would rather lose a few weights than all of
them a little. It introduces errors e that stand apart, and takes two closed-form steps in turns, 20 times:

    e = sign(r) max(|r| - |r|^(p-1) / beta, 0)  with r = w - s q     the outliers that are given up (the prox of |.|^p)
    s = <w - e, q> / <q, q>                                          the best scale for what is left

with beta growing by 1% each time. The original moves the zero point instead of the scale; our grids have none, so the
second step is its counterpart for the scale, by least squares. Errors are counted in steps of each group's first scale,
so that beta means the same for every matrix. Of all scales met, rounded as they are stored, each group keeps the best.

What it makes small is a norm of the weights' errors: no activation is looked at. It needs seconds, and no text.

Try it: python pipelines/sweep.py -m compression=rtn,hqq compression.bits=4 engine=eager
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed
from hasten.compression.shared.quantiser import Quantiser, nearest_scale
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.grid import Grid


@dataclass
class Hqq(Quantiser):
    """norm: p. penalty, penalty_growth: beta, and what it is multiplied with after each of the steps."""

    norm: float = 0.7
    penalty: float = 10.0
    penalty_growth: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.norm < 1:
            raise UserError(f"compression.norm must lie between 0 and 1, got {self.norm}")
        if not 0 < self.penalty < float("inf"):
            raise UserError(f"compression.penalty must be above 0 and finite, got {self.penalty}")
        if not 1 <= self.penalty_growth <= 10:
            raise UserError(f"compression.penalty_growth must be 1 to 10, got {self.penalty_growth}")
        if self.steps < 1:
            raise UserError(f"compression.steps must be at least 1, got {self.steps}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise every linear layer. Raises `UserError` on a quantised parent or a width that does not fit."""
        return self.nearest(*self.untied(parent), self.robust_scale)

    def robust_scale(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, groups)."""
        import torch

        from hasten.model.grid import portable_scale

        grid, first = self.grid, nearest_scale(weight, self.grid)
        grouped = weight.float().view(*first.shape, -1)
        w = grouped / first.unsqueeze(-1)  # (out, groups, width), in first steps
        s, beta = torch.ones_like(first), self.penalty
        best, lowest = first, lost(grouped, first, grid, self.norm)
        for _ in range(self.steps):
            q = (w / s.unsqueeze(-1)).round().clamp(grid.lowest, grid.highest)
            r = w - q * s.unsqueeze(-1)
            e = r.sign() * (r.abs() - r.abs() ** (self.norm - 1) / beta).clamp(min=0)
            weighed = q.square().sum(-1)
            s = torch.where(weighed > 0, ((w - e) * q).sum(-1) / weighed, s)
            beta *= self.penalty_growth
            scale = portable_scale(first * s)
            found = lost(grouped, scale, grid, self.norm)
            best = torch.where(found < lowest, scale, best)
            lowest = torch.minimum(found, lowest)
        return best


def lost(grouped: Tensor, scale: Tensor, grid: Grid, norm: float) -> Tensor:
    """The sum of |w - s q|^p: (out, groups, width), (out, groups) -> (out, groups)."""
    step = scale.unsqueeze(-1)
    q = (grouped / step).round().clamp(grid.lowest, grid.highest)
    return ((grouped - q * step).abs() ** norm).sum(-1)
