"""Weights that make up for those that go: the linear algebra of SparseGPT (`hasten.compression.sparsegpt`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.compression.shared.compensation import inverse_factor
from hasten.compression.shared.layerwise import Group, Inputs, Summing

if TYPE_CHECKING:
    from hasten.compression.sparsegpt import Sparsegpt


class Surgeon(Summing):
    """Zeroes weights group by group."""

    def __init__(self, options: Sparsegpt) -> None:
        self.options = options

    def settle(self, group: Group, inputs: Inputs) -> None:
        factor, _ = inverse_factor(inputs.gram, self.options.damping)
        for linear in group.linears:
            linear.weight.copy_(operated(linear.weight, factor, self.options))


def operated(weight: Tensor, factor: Tensor, options: Sparsegpt) -> Tensor:
    """A matrix (out, in) with weights at zero and the others moved, in float64."""
    weight, columns = weight.to(torch.float64, copy=True), weight.shape[1]
    for start in range(0, columns, options.block):
        end = min(start + options.block, columns)
        errors = torch.zeros_like(weight[:, start:end])
        gone = torch.zeros_like(errors, dtype=torch.bool)
        for j in range(start, end):
            if options.pattern == "2:4" and (j - start) % 4 == 0:
                chosen = slice(j, j + 4)
                gone[:, j - start : j - start + 4] = options.smallest(cost(weight, factor, chosen))
            elif options.pattern == "none" and j == start:
                costs = cost(weight, factor, slice(start, end))
                gone = options.smallest(costs.reshape(1, -1)).view(costs.shape)  # compared over the whole block
            error = torch.where(gone[:, j - start], weight[:, j] / factor[j, j], 0)
            weight[:, j:end].addr_(error, factor[j, j:end], alpha=-1)
            weight[:, j].masked_fill_(gone[:, j - start], 0)
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def cost(weight: Tensor, factor: Tensor, columns: slice) -> Tensor:
    """What it costs to set each of these weights to zero, if it is the only one."""
    return (weight[:, columns] / factor.diagonal()[columns]).square()
