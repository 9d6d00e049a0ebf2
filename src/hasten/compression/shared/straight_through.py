"""Fake quantisation: a network computes with weights on their grid, and learns the weights behind them.

Rounding is flat almost everywhere, so its true gradient is zero. The straight-through estimator hands the gradient of
the rounded weight on to the weight itself (Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.compression.shared.quantiser import nearest_scale
from hasten.model.grid import Grid, dequantise, quantise


class Rounded(torch.autograd.Function):
    """The weight on its grid, (out, in) float32; backwards as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        scale = nearest_scale(weight, grid)
        return dequantise(quantise(weight, scale, grid), scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class OnGrid(nn.Module):
    """What a weight is seen as while it trains."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        rounded: Tensor = Rounded.apply(weight, self.grid)  # type: ignore[no-untyped-call]
        return rounded


@contextmanager
def on_grid(linears: Sequence[nn.Module], grid: Grid) -> Iterator[None]:
    """Let these matrices be seen on the grid, as long as this lasts. Raises `UserError` for a width it does not fit."""
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", OnGrid(grid))
    yield
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
