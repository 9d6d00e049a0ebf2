"""The grid that quantised weights lie on, and how they are stored.

A weight matrix W (out, in) is stored as signed integers q and one scale s for each group of
`group_size` neighbours along the input: W = q * s. Symmetric: no zero point, q in [-2^(b-1), 2^(b-1)-1].
Scales are exact in both bfloat16 and float16, so every engine sees the same numbers: a 4-bit
group of 32 is llama.cpp's Q4_0 block, an 8-bit group of 32 its Q8_0 block.

On disk this is the open compressed-tensors layout, format `pack-quantized`
(https://github.com/neuralmagic/compressed-tensors): per matrix `<name>.weight_packed` (int32,
little-endian fields, integers shifted to unsigned), `<name>.weight_scale` (out, groups) and
`<name>.weight_shape`; transformers reads it. 8-bit floats (`hasten.compression.fp8`) lie there as `float-quantized`:
`<name>.weight` (float8_e4m3fn) and `<name>.weight_scale`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from hasten.errors import UserError, one_of

BITS = (4, 8)
TYPES = ("int", "float")
SMALLEST_SCALE = 2.0**-24  # the smallest float16 above zero
FLOAT8 = torch.float8_e4m3fn
LARGEST_SCALE = 65280.0  # the largest bfloat16 below float16's end


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

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if (name, value) != ("type", "int")}

    def groups(self, columns: int) -> int:
        """Groups per row of a matrix with that many columns. Raises `UserError` if they do not divide."""
        if self.group_size == 0:
            return 1
        if columns % self.group_size:
            raise UserError(f"group_size must divide every matrix's input width, got {self.group_size} for {columns}")
        return columns // self.group_size


def portable_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale (to within a rounding) that bfloat16 and float16 both hold exactly, float32, above zero.

    bfloat16 has 8 significant bits, float16 11 but a narrow exponent: rounding to the first and then
    to the second leaves a number that both hold, also where float16 is subnormal.
    """
    rounded = scale.to(torch.bfloat16).clamp(max=LARGEST_SCALE).to(torch.float16).float()
    return rounded.clamp(min=SMALLEST_SCALE)


def quantise(weight: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to the grid, half to even. weight (out, in), scale (out, groups) -> int8 (out, in)."""
    out, columns = weight.shape
    grouped = weight.float().view(out, grid.groups(columns), -1)
    q = torch.round(grouped / scale.float().unsqueeze(-1)).clamp(grid.lowest, grid.highest)
    return q.to(torch.int8).view(out, columns)


def dequantise(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """q (out, in) int8, scale (out, groups) -> float32 (out, in)."""
    out, columns = q.shape
    return (q.view(out, scale.shape[1], -1).float() * scale.float().unsqueeze(-1)).view(out, columns)


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 (out, in) -> int32 (out, ceil(in * bits / 32)), lowest field first, shifted to unsigned."""
    out, columns = q.shape
    per_word = 32 // bits
    unsigned = q.to(torch.int64) + 2 ** (bits - 1)
    padded = torch.nn.functional.pad(unsigned, (0, -columns % per_word)).view(out, -1, per_word)
    words: torch.Tensor = (padded << (torch.arange(per_word) * bits)).sum(dim=-1)
    words -= (words >= 2**31) * 2**32  # the same bits, read as signed
    return words.to(torch.int32)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: int32 (out, words) -> int8 (out, columns)."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    fields: torch.Tensor = (words.unsqueeze(-1) >> (torch.arange(32 // bits) * bits)) & (2**bits - 1)
    shifted: torch.Tensor = fields.flatten(1)[:, :columns] - 2 ** (bits - 1)
    return shifted.to(torch.int8)


def stored(name: str, q: torch.Tensor, scale: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """The tensors under which a quantised matrix `name` (without `.weight`) is saved."""
    return {
        f"{name}.weight_packed": pack(q, grid.bits).contiguous(),
        f"{name}.weight_scale": scale.float().contiguous(),
        f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }


def quantised_names(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names (without `.weight`) of the matrices that are stored as integers, or as 8-bit floats."""
    packed = [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]
    return packed + [key.removesuffix(".weight") for key, value in tensors.items() if value.dtype is FLOAT8]


def integers(tensors: dict[str, torch.Tensor], name: str, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored matrix's integers, int8 (out, in), or its 8-bit floats, and scales, float32 (out, groups).

    Raises `UserError` if a part is missing or the parts do not fit each other and the grid.
    """
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
    q, scale = (tensors.get(f"{name}.weight{part}", torch.empty(0)) for part in ("", "_scale"))
    if q.dtype is not FLOAT8 or q.dim() != 2 or tuple(scale.shape) != (len(q), 1):
        raise UserError(
            f"matrix {name} must be float8_e4m3fn with a scale for each row, got {q.dtype} {tuple(q.shape)} with "
            f"scales {tuple(scale.shape)}"
        )
    return q, scale.float()


def floats(tensors: dict[str, torch.Tensor], grid: Grid | None) -> dict[str, torch.Tensor]:
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


def quantization_config(grid: Grid, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` for `config.json`, as compressed-tensors writes it."""
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size or None,
        "dynamic": False,
        "observer": "minmax",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }
