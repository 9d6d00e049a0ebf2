"""Walks that scale columns before anything is rounded: the network stays the same, and the next walk rounds it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hasten.compression.shared.folding import fold, source
from hasten.compression.shared.layerwise import Group, Inputs, Summing
from hasten.compression.shared.quantiser import Integers, Scale, chosen_scale, nearest_scale
from hasten.compression.shared.rounding import Rounding, output_error
from hasten.model.decoder import Decoder, Norm
from hasten.model.grid import Grid, dequantise, quantise
from hasten.model.huggingface import network_tensors


class Scaling(Summing):
    """Folds a scale per column into every group that has something to take it."""

    def settle(self, group: Group, inputs: Inputs) -> None:
        before, used = source(group), any(linear.weight.any() for linear in group.linears)
        if before is not None and used and inputs.largest.any():
            fold(before, group.linears, self.scale(group, inputs))

    @abstractmethod
    def scale(self, group: Group, inputs: Inputs) -> Tensor:
        """What the columns are multiplied with, (in,), above zero."""


class Protecting(Scaling):
    """AWQ's: the power of the inputs' mean magnitude that serves the group's outputs best. powers: those chosen."""

    def __init__(self, grid: Grid, steps: int) -> None:
        self.grid, self.steps = grid, steps
        self.powers: dict[str, float] = {}

    def scale(self, group: Group, inputs: Inputs) -> Tensor:
        magnitude = above_zero(inputs.magnitude)
        powers = [step / self.steps for step in range(self.steps + 1)]
        scales = [spread(magnitude**power) for power in powers]
        errors = [sum(self.error(linear, scale, inputs) for linear in group.linears) for scale in scales]
        best = errors.index(min(errors))
        self.powers[group.names[0]] = powers[best]
        return scales[best]

    def error(self, linear: nn.Linear, scale: Tensor, inputs: Inputs) -> float:
        """How far the matrix's outputs are off if it is rounded with its columns scaled."""
        weight, factor = linear.weight.detach(), scale.float()
        scaled = weight * factor
        step = nearest_scale(scaled, self.grid)
        return output_error(dequantise(quantise(scaled, step, self.grid), step) / factor - weight, inputs.gram)


class Smoothing(Scaling):
    """SmoothQuant's: s = max|w|^(alpha - 1) max|x|^alpha, into norms alone."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def settle(self, group: Group, inputs: Inputs) -> None:
        if isinstance(source(group), Norm):
            super().settle(group, inputs)

    def scale(self, group: Group, inputs: Inputs) -> Tensor:
        matrices = torch.stack([linear.weight.detach().abs().amax(0) for linear in group.linears]).amax(0).double()
        return above_zero(inputs.largest) ** self.alpha / above_zero(matrices) ** (1 - self.alpha)


class Clipping(Rounding):
    """To nearest, with scales chosen by what each group adds to the outputs. plain: matrices that are not searched."""

    def __init__(self, grid: Grid, how: Scale, plain: tuple[str, ...] = ()) -> None:
        super().__init__(grid)
        self.how, self.plain = how, plain

    def rounded(self, name: str, weight: Tensor, inputs: Inputs) -> Integers:
        how = Scale.nearest if name.endswith(self.plain) else self.how
        grid = self.grid.of(name)
        scale = chosen_scale(weight, grid, how, inputs.gram)
        return quantise(weight, scale, grid), scale


def changed(model: Decoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What differs from a checkpoint's tensors, as float32: norms, biases; of matrices that are rounded next, all."""
    return {
        name: value
        for name, value in network_tensors(model).items()
        if name.endswith("_proj.weight") or (value.dim() == 1 and not torch.equal(value, tensors[name].float()))
    }


def above_zero(sizes: Tensor) -> Tensor:
    """Sizes of columns, those that are nothing raised to a ten thousandth of the largest."""
    return sizes.clamp(min=1e-4 * float(sizes.max()))


def spread(scale: Tensor) -> Tensor:
    """The same ratios, around one."""
    around: Tensor = scale / (scale.max() * scale.min()).sqrt()
    return around
