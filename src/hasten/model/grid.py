"""The grid that quantised weights lie on, and how they are stored.

A weight matrix W (out, in) is stored as signed integers q and one scale s for each group of
`group_size` neighbours along the input: W = q * s. Symmetric: no zero point, q in [-2^(b-1), 2^(b-1)-1].
Scales are exact in both bfloat16 and float16, so every engine sees the same numbers: a 4-bit
group of 32 is llama.cpp's Q4_0 block, an 8-bit group of 32 its Q8_0 block.

On disk this is the open compressed-tensors layout, format `pack-quantized`
(https://github.com/neuralmagic/compressed-tensors): per matrix `<name>.weight_packed` (int32,
little-endian fields, integers shifted to unsigned), `<name>.weight_scale` (out, groups) and
`<name>.weight_shape`; transformers reads it. 8-bit floats (`hasten.compression.fp8`) lie there as `float-quantized`:
`<name>.weight` (float8_e4m3fn) and `<name>.weight_scale`. The manifest says on which grid they lie: `Grid`, one for all
matrices, or `Grids`, which names the matrices of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    import torch

    from hasten.artifacts import Checkpoint

BITS = (4, 8)
TYPES = ("int", "float")
SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero
LARGEST_SCALE = 65280.0  # the largest bfloat16 below float16's end
ROWS = 4096
"""Rows of a matrix that are multiplied at once: a head has one for every word."""
WEIGHTS = 2**17
"""About as many weights are computed with at once, weight by weight: what is computed on the way stays in the cache."""


@dataclass(frozen=True)
class Grid:
    """bits: 4 or 8. group_size: neighbours that share a scale; 0 means the whole row (per channel).

    type: `int`, or `float` for E4M3, of which there are 8 bits and whole rows alone.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    type: str = "int"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise one_of("bits", self.bits, list(BITS))
        if self.group_size < 0:
            raise UserError(f"group_size must be 0 (per channel) or more, got {self.group_size}")
        if not self.symmetric:
            raise UserError("symmetric must be true, got False: no engine here runs an asymmetric grid natively")
        if self.type not in TYPES:
            raise one_of("type", self.type, list(TYPES))
        if self.type == "float" and (self.bits, self.group_size) != (8, 0):
            raise UserError(
                f"type float has 8 bits and whole rows (group_size 0), got {self.bits} and {self.group_size}"
            )

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def words(self) -> str:
        """`int4 group 32`, `int8 per channel`, `float8 per channel`."""
        return f"{self.type}{self.bits} {f'group {self.group_size}' if self.group_size else 'per channel'}"

    @property
    def kinds(self) -> tuple[Grid, ...]:
        """As of `Grids`."""
        return (self,)

    def covers(self, name: str) -> bool:
        """As of `Grids`."""
        return True

    def of(self, name: str) -> Grid:
        """As of `Grids`."""
        return self

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if (name, value) != ("type", "int")}

    def groups(self, columns: int) -> int:
        """Groups per row of a matrix with that many columns. Raises `UserError` if they do not divide."""
        if self.group_size == 0:
            return 1
        if columns % self.group_size:
            raise UserError(f"group_size must divide every matrix's input width, got {self.group_size} for {columns}")
        return columns // self.group_size


@dataclass(frozen=True)
class Grids:
    """A grid for each matrix, by its name (without `.weight`). A matrix without one is stored as floats."""

    by_name: Mapping[str, Grid]

    @property
    def kinds(self) -> tuple[Grid, ...]:
        """The grids that there are, those of fewer bits first."""
        return tuple(sorted(set(self.by_name.values()), key=lambda grid: (grid.bits, grid.group_size)))

    def covers(self, name: str) -> bool:
        """Whether a matrix lies on a grid."""
        return name in self.by_name

    def of(self, name: str) -> Grid:
        """The grid of a matrix that is stored as integers. Raises `UserError` if none is declared."""
        if name not in self.by_name:
            raise UserError(f"the checkpoint stores integers of {name} but its manifest declares no grid for it")
        return self.by_name[name]

    def named(self, kind: Grid) -> list[str]:
        """The matrices on a grid."""
        return [name for name, grid in self.by_name.items() if grid == kind]

    def describe(self) -> dict[str, Any]:
        return {"groups": [{**kind.describe(), "matrices": self.named(kind)} for kind in self.kinds]}


def read_grid(described: Mapping[str, Any]) -> Grid | Grids:
    """The inverse of both `describe`s."""
    if "groups" not in described:
        return Grid(**described)
    found: dict[str, Grid] = {}
    for group in described["groups"]:
        grid = Grid(**{key: value for key, value in group.items() if key != "matrices"})
        found.update(dict.fromkeys(group["matrices"], grid))
    return Grids(found)


def grid_of(checkpoint: Checkpoint) -> Grid | Grids | None:
    """The grid, or those, that a checkpoint's manifest declares, or None for float weights.

    Raises `UserError` for one that does not exist.
    """
    grid = checkpoint.manifest.get("grid")
    return read_grid(grid) if grid else None


def portable_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale (to within a rounding) that bfloat16 and float16 both hold exactly, float32, above zero.

    bfloat16 has 8 significant bits, float16 11 but a narrow exponent: rounding to the first and then
    to the second leaves a number that both hold, also where float16 is subnormal.
    """
    import torch

    rounded = scale.to(torch.bfloat16).clamp(max=LARGEST_SCALE).to(torch.float16).float()
    return rounded.clamp(min=SMALLEST_SCALE)


def by_rows(function: Callable[..., torch.Tensor], *matrices: torch.Tensor, rows: int = 0) -> torch.Tensor:
    """function(*matrices), where each row of the result comes from the same row of each: some rows at a time (0: such
    that the first has `WEIGHTS` there), so that what is computed on the way stays small.
    """
    rows = rows or max(1, WEIGHTS // max(1, matrices[0].shape[1]))
    parts = zip(*(matrix.split(rows) for matrix in matrices), strict=True)
    first = function(*next(parts))
    if len(matrices[0]) <= rows:
        return first
    result = first.new_empty(len(matrices[0]), *first.shape[1:])
    result[:rows] = first
    for number, part in enumerate(parts, 1):
        result[number * rows : (number + 1) * rows] = function(*part)
    return result


def quantise(weight: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to the grid, half to even. weight (out, in), scale (out, groups) -> int8 (out, in)."""
    import torch

    def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out, columns = weight.shape
        grouped = weight.float().view(out, grid.groups(columns), -1)
        q = torch.round(grouped / scale.float().unsqueeze(-1)).clamp(grid.lowest, grid.highest)
        return q.to(torch.int8).view(out, columns)

    return by_rows(rounded, weight, scale)


def dequantise(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q (out, in) int8, scale (out, groups) -> float32 (out, in)."""

    def multiplied(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out, columns = q.shape
        return (q.view(out, scale.shape[1], -1).float() * scale.float().unsqueeze(-1)).view(out, columns)

    return by_rows(multiplied, q, scale)


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in) -> int32 (out, ceil(in * bits / 32)), lowest field first, shifted to unsigned."""
    import torch

    per_word = 32 // bits

    def packed(q: torch.Tensor) -> torch.Tensor:
        unsigned = q.to(torch.int64) + 2 ** (bits - 1)
        padded = torch.nn.functional.pad(unsigned, (0, -q.shape[1] % per_word)).view(len(q), -1, per_word)
        words: torch.Tensor = (padded << (torch.arange(per_word) * bits)).sum(dim=-1)
        words -= (words >= 2**31) * 2**32  # the same bits, read as signed
        return words.to(torch.int32)

    return by_rows(packed, q)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: int32 (out, words) -> int8 (out, columns)."""
    import torch

    def integers(packed: torch.Tensor) -> torch.Tensor:
        words = packed.to(torch.int64) & 0xFFFFFFFF
        fields: torch.Tensor = (words.unsqueeze(-1) >> (torch.arange(32 // bits) * bits)) & (2**bits - 1)
        shifted: torch.Tensor = fields.flatten(1)[:, :columns] - 2 ** (bits - 1)
        return shifted.to(torch.int8)

    return by_rows(integers, packed)


def stored(name: str, q: torch.Tensor, scale: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """The tensors under which a quantised matrix `name` (without `.weight`) is saved."""
    import torch

    return {
        f"{name}.weight_packed": pack(q, grid.bits).contiguous(),
        f"{name}.weight_scale": scale.float().contiguous(),
        f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }


def quantised_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names (without `.weight`) of the matrices that are stored as integers, or as 8-bit floats."""
    import torch

    packed = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    narrow = [key for key, value in tensors.items() if value.dtype is torch.float8_e4m3fn]
    return packed + [key.removesuffix(".weight") for key in narrow]


def integers(tensors: dict[str, torch.Tensor], name: str, grid: Grid | Grids) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored matrix's integers, int8 (out, in), or its 8-bit floats, and scales, float32 (out, groups).

    Raises `UserError` if a part is missing or the parts do not fit each other and the grid.
    """
    grid = grid.of(name)
    if grid.type == "float":
        return eight_bit_floats(tensors, name)
    try:
        packed, scale, shape = (tensors[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape"))
    except KeyError as error:
        raise UserError(f"the checkpoint lacks {error.args[0]}") from None
    out, columns = shape.tolist() if shape.numel() == 2 else (0, 0)
    words = -(-columns * grid.bits // 32)
    if tuple(packed.shape) != (out, words) or tuple(scale.shape) != (out, grid.groups(columns)):
        raise UserError(
            f"quantised matrix {name} does not fit its shape {shape.tolist()} and grid {grid.describe()}: "
            f"packed {tuple(packed.shape)}, scales {tuple(scale.shape)}"
        )
    return unpack(packed, grid.bits, columns), scale.float()


def eight_bit_floats(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored matrix's 8-bit floats (out, in) and scales, float32 (out, 1). Raises `UserError` as `integers`."""
    import torch

    q, scale = (tensors.get(f"{name}.weight{part}", torch.empty(0)) for part in ("", "_scale"))
    if q.dtype is not torch.float8_e4m3fn or q.dim() != 2 or tuple(scale.shape) != (len(q), 1):
        raise UserError(
            f"matrix {name} must be float8_e4m3fn with a scale for each row, got {q.dtype} {tuple(q.shape)} with "
            f"scales {tuple(scale.shape)}"
        )
    return q, scale.float()


def floats(tensors: dict[str, torch.Tensor], grid: Grid | Grids | None) -> dict[str, torch.Tensor]:
    """The same model with every matrix as float32: integers are dequantised, the rest is passed on."""
    names = quantised_names(tensors)
    if not names:
        return tensors
    if grid is None:
        raise UserError("the checkpoint stores integers but its manifest declares no grid")
    suffixes = (".weight_packed", ".weight_scale", ".weight_shape")
    result = {key: value for key, value in tensors.items() if not key.endswith(suffixes)}
    result.update({f"{name}.weight": dequantise(*integers(tensors, name, grid)) for name in names})
    return result


def quantization_config(grid: Grid | Grids, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` for `config.json`, as compressed-tensors writes it.

    Several grids name their matrices: a reader that joins matrices of one input looks for them by their names.
    """
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if isinstance(grid, Grid) else grid.named(kind),
            "weights": {
                "num_bits": kind.bits,
                "type": kind.type,
                "symmetric": kind.symmetric,
                "strategy": "group" if kind.group_size else "channel",
                "group_size": kind.group_size or None,
                "dynamic": False,
                "observer": "minmax",
            },
        }
        for number, kind in enumerate(grid.kinds)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if any(kind.type == "float" for kind in grid.kinds) else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }
