"""Mixed precision: more bits for the matrices that miss them most, under a budget of bytes.

Decoding reads every weight for every token, so bytes are time; but what a byte saves is not the same everywhere. A few
matrices lose far more to 4 bits than all others together. Each is therefore rounded alone, to each candidate, and what
this does to the whole network is measured on calibration text: how far the distribution of the next token moves, as
the KL divergence from that of the float network, in nats per token. Matrices that are given the same inputs (queries,
keys and values; gate and up) count as one, since engines multiply them as one.

Damages are taken to add up, as in HAWQ-V2 (Dong et al. 2019, arXiv:1911.03852), which estimates them by the Hessian's
trace instead. Then the choice is a knapsack: the smallest sum that fits the budget. It is solved exactly, by keeping of
all choices so far those that no other beats in bytes and in damage; they are few, since matrices come in few sizes.

How the matrices are then rounded is another question (`rounding`): to nearest, or by GPTQ, which makes up for errors.

    python pipelines/sweep.py -m compression=mixed compression.bits_per_weight=4.5,5,6,8.5 engine=eager,native
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.compression.shared.quantiser import Integers, Scale, check_grid, chosen_scale, on_grid, untied
from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.compression.shared.layerwise import Group
    from hasten.model.decoder import Decoder
    from hasten.model.grid import Grid, Grids

FLOAT = 16
"""The candidate that leaves floats, counted as engines hold them."""
BITS = (4, 8, FLOAT)
SCALE_BYTES = 2


class Rounding(Enum):
    """How matrices are rounded to what they get: as `rtn` or as `gptq` does it."""

    rtn = "rtn"
    gptq = "gptq"


@dataclass
class Mixed(Compressor):
    """bits_per_weight: what a weight of these matrices may take on average, with its share of a 16-bit scale: 4 bits
    in groups of 32 take 4.5, 8 take 8.5. candidates: bits to choose from, 16 leaves floats. group_size, head, scale: as
    for `rtn`. rounding: rtn or gptq. damping: of gptq.
    """

    bits_per_weight: float = 5.0
    candidates: list[int] = field(default_factory=lambda: [4, 8])
    group_size: int = 32
    head: bool = True
    scale: Scale = Scale.nearest
    rounding: Rounding = Rounding.rtn
    damping: float = 0.01

    needs: ClassVar[str] = "calibration"
    takes_factors: ClassVar[bool] = True
    grids: ClassVar[str] = "4 bits, 8 bits or floats by matrix, any group size that divides the widths, symmetric"

    def __post_init__(self) -> None:
        if len(self.candidates) < 2 or self.candidates != sorted(set(self.candidates)):
            raise UserError(f"compression.candidates must be at least two in ascending order, got {self.candidates}")
        if unknown := [bits for bits in self.candidates if bits not in BITS]:
            raise one_of("compression.candidates", unknown[0], list(BITS))
        for bits in self.integral:
            check_grid(bits, self.group_size)
        if not 0 <= self.damping <= 1:
            raise UserError(f"compression.damping must be 0 to 1, got {self.damping}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Measure, choose, round. Raises `UserError` on a quantised parent, another network, without text, or for a
        budget below that of the smallest candidate.
        """
        from hasten.compression.shared.layerwise import groups
        from hasten.compression.shared.sensitivity import divergences
        from hasten.model.grid import Grid, Grids

        text, model = self.given(calibration), self.network(parent)
        units, on = groups(model, head=self.head), {bits: Grid(bits, self.group_size) for bits in self.integral}
        weights = sum(linear.weight.numel() for unit in units for linear in unit.linears)
        sizes = [{bits: self.size(unit, bits) for bits in self.candidates} for unit in units]
        budget = self.budget(sizes, weights)
        damages = divergences(model, text, units, {grid: self.scales(units, grid) for grid in on.values()})
        options = [
            {bits: (taken, damage.get(bits, 0.0)) for bits, taken in size.items()}
            for size, damage in zip(sizes, damages, strict=True)
        ]
        bits_of = cheapest(options, budget)
        taken = sum(size[bits] for size, bits in zip(sizes, bits_of, strict=True))
        notes = {
            "bits_per_weight": round(8 * taken / weights, 6),
            "divergence": {
                unit.names[0]: {str(bits): round(value, 9) for bits, value in damage.items()}
                for unit, damage in zip(units, damages, strict=True)
            },
        }
        chosen = {name: bits for unit, bits in zip(units, bits_of, strict=True) for name in unit.names}
        grids = Grids({name: on[bits] for name, bits in chosen.items() if bits in on})
        del units  # a block that is done can go
        config, tensors = untied(self, parent, head=grids.covers("lm_head"))
        if self.rounding is Rounding.gptq:
            integers = self.compensated(model, text, grids)
            del model
        else:
            del model
            integers = dict(self.nearest(tensors, grids))
        return on_grid(grids, config, tensors, integers, notes)

    def scales(self, units: Sequence[Group], grid: Grid) -> dict[str, Tensor]:
        """Of every matrix by its name, (out, groups), as bfloat16, which holds them exactly."""
        return {
            name: chosen_scale(linear.weight.detach(), grid, self.scale).bfloat16()
            for unit in units
            for name, linear in zip(unit.names, unit.linears, strict=True)
        }

    def nearest(self, tensors: Mapping[str, Tensor], grids: Grids) -> Iterator[tuple[str, Integers]]:
        """Each matrix that has a grid, by tensor name, rounded to nearest."""
        from hasten.model.grid import quantise

        for matrix, grid in grids.by_name.items():
            weight = tensors[f"{matrix}.weight"]
            scale = chosen_scale(weight, grid, self.scale)
            yield f"{matrix}.weight", (quantise(weight, scale, grid), scale)

    @property
    def integral(self) -> list[int]:
        """The candidates that are integers."""
        return [bits for bits in self.candidates if bits != FLOAT]

    def size(self, unit: Group, bits: int) -> int:
        """Bytes of a unit's matrices. Raises `UserError` if groups do not divide their width."""
        from hasten.model.layout import Layout, Matrix

        layout = Layout(bits) if bits == FLOAT else Layout(bits, SCALE_BYTES, self.group_size)
        return sum(layout.bytes_of(Matrix(*linear.weight.shape)) for linear in unit.linears)

    def budget(self, sizes: Sequence[Mapping[int, int]], weights: int) -> int:
        """In bytes. Raises `UserError` if nothing fits it."""
        budget, least = int(self.bits_per_weight * weights / 8), sum(size[min(size)] for size in sizes)
        if budget < least:
            needed = f"{8 * least / weights:.6g} ({min(self.candidates)} bits everywhere, and their scales)"
            raise UserError(f"compression.bits_per_weight must be at least {needed}, got {self.bits_per_weight}")
        return budget

    def compensated(self, model: Decoder, text: Calibration, grids: Grids) -> dict[str, Integers]:
        """What GPTQ makes of it."""
        from hasten.compression.shared.compensation import Compensating
        from hasten.compression.shared.layerwise import walk

        work = Compensating(grids, self.scale, damping=self.damping, act_order=True)
        walk(model, text, work, head=grids.covers("lm_head"), last=True)
        return work.integers


def cheapest(options: Sequence[Mapping[int, tuple[int, float]]], budget: int) -> list[int]:
    """One option of each, (bytes, damage) by its name: the least damage within a budget that holds the smallest."""
    least = [min(size for size, _ in option.values()) for option in options]
    rest = [sum(least[at:]) for at in range(1, len(least) + 1)]  # what those still to come take at the least
    found: list[tuple[int, float, list[int]]] = [(0, 0.0, [])]
    for option, needed in zip(options, rest, strict=True):
        extended = [
            (taken + size, damage + own, [*names, name])
            for taken, damage, names in found
            for name, (size, own) in option.items()
            if taken + size + needed <= budget
        ]
        found, lowest = [], float("inf")
        for one in sorted(extended, key=lambda one: one[:2]):
            if one[1] < lowest:
                found.append(one)
                lowest = one[1]
    return found[-1][2]
