"""What methods that land on a grid share: its options, which matrices they quantise, how those are stored."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, cast

from hasten.artifacts import Checkpoint, Json, Stored
from hasten.compression.base import Compressed, Compressor
from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.grid import Grid, Grids

Integers = tuple["Tensor", "Tensor"]
"""A matrix on a grid: int8 (out, in) and its scales, float32 (out, groups)."""
FACTORS = tuple(part / 48 for part in range(53, 23, -1))
"""What a search multiplies the nearest scale with: 1.1, where nothing is clipped, down to half.

One of them is 15/16: on [-8, 7] it puts a group's largest magnitude on -8 if the scale has the other sign.
"""


class Scale(Enum):
    """How a group's scale is found.

    nearest: the largest magnitude is spread over the grid. search: of 30 factors of that, the one whose error is
    smallest; clipping one outlier may serve its neighbours. signed: the same, and a scale may be negative, so that the
    largest weight can lie on the grid's longer end, -8 of [-8, 7], whatever its sign (what llama.cpp does for Q4_0).
    """

    nearest = "nearest"
    search = "search"
    signed = "signed"


@dataclass
class Quantiser(Compressor):
    """bits: 4 or 8. group_size: weights that share a scale, 0 means a whole row. head: quantise the output matrix too.

    A tied head is untied by quantising it: the embedding stays float, the head becomes integers.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    head: bool = True

    grids: ClassVar[str] = "4 or 8 bits, any group size that divides the widths, symmetric"

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)
        if not self.symmetric:
            raise UserError("compression.symmetric must be true, got False: no engine runs an asymmetric grid natively")

    @property
    def grid(self) -> Grid:
        from hasten.model.grid import Grid

        return Grid(self.bits, self.group_size, self.symmetric)

    def untied(self, parent: Checkpoint) -> tuple[Json, Stored]:
        """As `untied`, if the head is to be quantised."""
        return untied(self, parent, head=self.head)

    def quantises(self, name: str) -> bool:
        """Whether a checkpoint's tensor becomes integers."""
        return is_linear(name) and (self.head or name != "lm_head.weight")

    def nearest(
        self,
        config: Json,
        tensors: Mapping[str, Tensor],
        scale: Callable[[Tensor], Tensor],
        changed: dict[str, Tensor] | None = None,
    ) -> Compressed:
        """The variant with every matrix rounded to nearest. scale: of a matrix, (out, in) -> (out, groups). changed:
        tensors to take instead; matrices are taken out of it as they are rounded.
        """
        from hasten.model.grid import by_rows, quantise

        integers, changed = {}, changed or {}
        for name in filter(self.quantises, tensors):
            weight = changed.pop(name) if name in changed else tensors[name]
            found = by_rows(scale, weight)
            integers[name] = quantise(weight, found, self.grid), found
            del weight  # before the next one is read
        return self.stored(config, over(tensors, changed), integers)

    def stored(
        self, config: Json, tensors: Mapping[str, Tensor], integers: dict[str, Integers], **facts: Any
    ) -> Compressed:
        """The variant: matrices (by tensor name) as integers, every other tensor as it is. facts: for the manifest."""
        assert integers.keys() == {name for name in tensors if self.quantises(name)}
        return on_grid(self.grid, config, tensors, integers, facts)


def untied(method: Compressor, parent: Checkpoint, *, head: bool) -> tuple[Json, Stored]:
    """The parent's config and tensors, read one by one; head: with a head of its own, which is to become integers.

    Raises `UserError` on a quantised parent.
    """
    from hasten.model.grid import quantised_names

    config, tensors = dict(parent.config), parent.stored()
    if quantised_names(parent.tensors()):
        raise UserError(f"{method.name} needs a float parent, got {parent.path} which is already quantised")
    if head and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
        tensors = tensors.with_copy("lm_head.weight", "model.embed_tokens.weight")
    return config, tensors


def over(tensors: Mapping[str, Tensor], changed: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors with some of them changed; the others are not asked for before they are needed."""
    return ChainMap(changed, cast("dict[str, Tensor]", tensors))


def on_grid(
    grid: Grid | Grids, config: Json, tensors: Mapping[str, Tensor], integers: dict[str, Integers], facts: Json
) -> Compressed:
    """A variant: matrices (by tensor name) as integers, every other tensor as it is. facts: for the manifest.

    Takes each out of `integers` as it is packed, so that they are not in memory twice; of `tensors` (of a file, read
    when they are asked for: `Checkpoint.stored`) those alone that stay as they are.
    """
    from hasten.model.grid import quantization_config, stored

    result: dict[str, Tensor] = {}
    for name in tensors:
        if name in integers:
            matrix = name.removesuffix(".weight")
            result.update(stored(matrix, *integers.pop(name), grid.of(matrix)))
        else:
            result[name] = tensors[name]
    linear = {**dict.fromkeys(name for name in tensors if is_linear(name)), "lm_head.weight": None}  # tied or not
    ignored = [name.removesuffix(".weight") for name in linear if f"{name}_packed" not in result]
    return Compressed({**config, "quantization_config": quantization_config(grid, ignored)}, result, grid, facts)


def check_grid(bits: int, group_size: int) -> None:
    """Raises `UserError` for options that no grid of integers has."""
    if bits not in (4, 8):
        raise one_of("compression.bits", bits, [4, 8])
    if group_size < 0:
        raise UserError(f"compression.group_size must be 0 (whole row) or more, got {group_size}")


def is_linear(name: str) -> bool:
    """Whether a checkpoint tensor is a linear layer's matrix (not an embedding, not a norm)."""
    return name.endswith(("_proj.weight", "lm_head.weight"))


def nearest_scale(weight: Tensor, grid: Grid) -> Tensor:
    """Scales that spread each group's largest magnitude over the grid: (out, in) -> (out, groups) float32."""
    from hasten.model.grid import portable_scale

    return portable_scale(full_scale(weight, grid))


def full_scale(weight: Tensor, grid: Grid) -> Tensor:
    """The same before it is rounded to what engines can hold."""
    out, columns = weight.shape
    largest = weight.float().view(out, grid.groups(columns), -1).abs().amax(dim=-1)
    return largest / ((grid.highest - grid.lowest) / 2)


def chosen_scale(weight: Tensor, grid: Grid, how: Scale, metric: Tensor | None = None) -> Tensor:
    """Scales by nearest or by a search that never does worse. metric: as in `group_errors`."""
    from hasten.model.grid import ROWS, by_rows

    if how is Scale.nearest:
        return by_rows(lambda part: nearest_scale(part, grid), weight)
    multiplied = metric is not None and metric.dim() == 2
    return by_rows(lambda part: searched_scale(part, grid, how, metric), weight, rows=ROWS if multiplied else 0)


def searched_scale(weight: Tensor, grid: Grid, how: Scale, metric: Tensor | None) -> Tensor:
    """The best of the nearest scale and `FACTORS` of it."""
    import torch

    from hasten.model.grid import dequantise, portable_scale, quantise

    def error(scale: Tensor) -> Tensor:
        return group_errors(dequantise(quantise(weight, scale, grid), scale) - weight, grid, metric)

    best = nearest_scale(weight, grid)
    full, lowest = full_scale(weight, grid), error(best)
    for factor in FACTORS:
        for sign in (1, -1) if how is Scale.signed else (1,):
            scale = sign * portable_scale(full * factor)
            found = error(scale)
            best = torch.where(found < lowest, scale, best)
            lowest = torch.minimum(found, lowest)
    return best


def group_errors(difference: Tensor, grid: Grid, metric: Tensor | None = None) -> Tensor:
    """How much each group's error weighs: (out, in) -> (out, groups).

    metric: None for plain squares; (in,) weighs each column's; (in, in), the inputs' x^T x, gives the squared error of
    what the group adds to the output.
    """
    import torch

    out, columns = difference.shape
    groups = grid.groups(columns)
    d = difference.view(out, groups, -1)
    if metric is None:
        return d.square().sum(-1)
    if metric.dim() == 1:
        return (d.square() * metric.to(d.dtype).view(groups, -1)).sum(-1)
    width = columns // groups
    own = torch.stack([metric[at : at + width, at : at + width] for at in range(0, columns, width)]).to(d.dtype)
    return ((d.transpose(0, 1) @ own).transpose(0, 1) * d).sum(-1)  # (groups, out, width) x (groups, width, width)
