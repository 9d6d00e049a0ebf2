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
from contextlib import contextmanager
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
    from hasten.model.grid import Grids

FLOAT = 16
"""The candidate that leaves floats, counted as engines hold them."""
BITS = (4, 8, FLOAT)
SCALE_BYTES = 2
TOKENS = 64
"""Tokens whose distributions are computed with at once."""


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
        from torch import nn

        from hasten.compression.shared.layerwise import groups
        from hasten.model.grid import Grid, Grids, quantise

        text, model = self.given(calibration), self.network(parent)
        if self.head:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach())  # to be replaced alone, if it is tied
        units, on = groups(model, head=self.head), {bits: Grid(bits, self.group_size) for bits in self.integral}
        rounded: dict[int, dict[str, Integers]] = {bits: {} for bits in on}
        for name, linear in ((name, one) for unit in units for name, one in zip(unit.names, unit.linears, strict=True)):
            for bits, grid in on.items():
                scale = chosen_scale(linear.weight.detach(), grid, self.scale)
                rounded[bits][name] = quantise(linear.weight.detach(), scale, grid), scale
        damages = divergences(model, text, units, rounded)
        options = [
            {bits: (self.size(unit, bits), damage.get(bits, 0.0)) for bits in self.candidates}
            for unit, damage in zip(units, damages, strict=True)
        ]
        weights = sum(linear.weight.numel() for unit in units for linear in unit.linears)
        bits_of = cheapest(options, self.budget(options, weights))
        taken = sum(option[bits][0] for option, bits in zip(options, bits_of, strict=True))
        notes = {
            "bits_per_weight": round(8 * taken / weights, 6),
            "divergence": {
                unit.names[0]: {str(bits): round(value, 9) for bits, value in damage.items()}
                for unit, damage in zip(units, damages, strict=True)
            },
        }
        chosen = {name: bits for unit, bits in zip(units, bits_of, strict=True) for name in unit.names}
        grids = Grids({name: on[bits] for name, bits in chosen.items() if bits in on})
        integers = {f"{name}.weight": rounded[grid.bits][name] for name, grid in grids.by_name.items()}
        del rounded, units  # of the rest nothing is needed
        if self.rounding is Rounding.gptq:
            integers.clear()
            integers = self.compensated(model, text, grids)
        del model
        return on_grid(grids, *untied(self, parent, head=grids.covers("lm_head")), integers, notes)

    @property
    def integral(self) -> list[int]:
        """The candidates that are integers."""
        return [bits for bits in self.candidates if bits != FLOAT]

    def size(self, unit: Group, bits: int) -> int:
        """Bytes of a unit's matrices. Raises `UserError` if groups do not divide their width."""
        from hasten.model.layout import Layout, Matrix

        layout = Layout(bits) if bits == FLOAT else Layout(bits, SCALE_BYTES, self.group_size)
        return sum(layout.bytes_of(Matrix(*linear.weight.shape)) for linear in unit.linears)

    def budget(self, options: Sequence[Mapping[int, tuple[int, float]]], weights: int) -> int:
        """In bytes. Raises `UserError` if nothing fits it."""
        budget, least = int(self.bits_per_weight * weights / 8), sum(option[min(option)][0] for option in options)
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


def divergences(
    model: Decoder, text: Calibration, units: Sequence[Group], rounded: Mapping[int, Mapping[str, Integers]]
) -> list[dict[int, float]]:
    """By how many nats per token predictions move if a unit alone is rounded, unit by unit and by bits.

    What comes before a unit is computed once for all, so a pass is half a pass. In memory are the network, its integers
    by candidate and, for 8 rows, the states before each block and two distributions for each token.
    """
    import torch

    from hasten.compression.shared.layerwise import ROWS

    places = {id(layer): place for place, layer in enumerate(model.model.layers)}
    sums: list[dict[int, float]] = [dict.fromkeys(rounded, 0.0) for _ in units]
    tokens = 0
    with torch.no_grad():
        for start in range(0, len(text.ids), ROWS):
            rows = Rows(model, text, slice(start, start + ROWS))
            before = rows.predictions(len(places))
            tokens += len(before)
            for unit, total in zip(units, sums, strict=True):
                for bits, integers in rounded.items():
                    with replaced(unit, integers):
                        after = rows.predictions(places.get(id(unit.block), len(places)))
                    total[bits] += divergence(before, after)
                    del after  # before the next one
    return [{bits: max(0.0, value / max(1, tokens)) for bits, value in total.items()} for total in sums]


def divergence(before: Tensor, after: Tensor) -> float:
    """The KL divergence of distributions, (tokens, vocabulary) log-probabilities, summed over tokens. Overwrites
    `after`, so that there is no third matrix of this size.
    """
    import torch

    for old, new in zip(before.split(TOKENS), after.split(TOKENS), strict=True):
        torch.sub(old, new, out=new).mul_(old.exp())
    return float(after.sum(dtype=torch.float64))


class Rows:
    """Some rows of text in a network: the states before each block and behind the last, (N, T, hidden)."""

    def __init__(self, model: Decoder, text: Calibration, part: slice) -> None:
        from hasten.compression.shared.layerwise import view

        stack = self.stack = model.model
        self.head, self.counts = model.lm_head, text.weights[part, 1:] > 0  # what predicts a token that counts
        views = {slides: view(model, text, part, slides) for slides in set(stack.slides)}
        self.blocks = [(block, views[slides]) for block, slides in zip(stack.layers, stack.slides, strict=True)]
        self.states = [stack.embed(text.ids[part])]
        for block, seen in self.blocks:
            self.states.append(block(self.states[-1], seen, None))

    def predictions(self, place: int) -> Tensor:
        """Log-probabilities (tokens, vocabulary), with the blocks from `place` on as they are now."""
        x = self.states[place]
        for block, seen in self.blocks[place:]:
            x = block(x, seen, None)
        logits: Tensor = self.head(self.stack.norm(x)[:, :-1][self.counts])
        for part in logits.split(TOKENS):
            part.copy_(part.log_softmax(-1))
        return logits


@contextmanager
def replaced(unit: Group, integers: Mapping[str, Integers]) -> Iterator[None]:
    """The unit's matrices as these integers, as long as this lasts."""
    from hasten.model.grid import dequantise

    kept = [linear.weight.data for linear in unit.linears]
    for name, linear in zip(unit.names, unit.linears, strict=True):
        linear.weight.data = dequantise(*integers[name])
    try:
        yield
    finally:
        for linear, weight in zip(unit.linears, kept, strict=True):
            linear.weight.data = weight


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
