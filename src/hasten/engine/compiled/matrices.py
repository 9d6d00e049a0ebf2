"""A variant's matrices in the form in which torch multiplies with them: floats, or the integers that its kernels read.

int8 per channel: `aten._weight_int8pack_mm` reads q (R, C) as it is and a scale for each row. int4 in groups:
`aten._weight_int4pack_mm_for_cpu` reads two to a byte, in an order of its own, shifted by 8 to unsigned, beside a scale
and a zero for each group: w = (u - 8) * scale + zero. A symmetric grid has zero = 0 and scales are exact in 16 bits, so
both multiply with exactly `hasten.model.grid.dequantise`; nothing is rounded but sums.

Where activations may be rounded, a prompt's before int8 matrices are: each token to 8 bits, with its own scale. Then
`aten._int_mm` (oneDNN) sums products of integers in 32 bits, exactly, and both scales come after: 3.9 times as fast as
`_weight_int8pack_mm`. A token by itself is not rounded: that would take 1.5 times as long (docs/log.md).

Matrices with the same input become one, below each other: one product instead of three, one reading of the input.
Shapes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.artifacts import Checkpoint
from hasten.engine.compiled.kernels import Packed, Product, fixed
from hasten.errors import UserError
from hasten.model.grid import Grid, Grids, grid_of, integers
from hasten.model.shape import outline, read_shape

INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 16
"""torch packs this many rows together."""
INT8_COLUMNS = 16
"""torch reads this many at once, also where a row ends before: a wrong sum (torch 2.13), or the end of the process.
`_int_mm` writes no result where there is one column."""

TOGETHER = 4
"""Rows that one loop sums at a time."""


def unsupported(grid: Grid, product: Product = Product.widened) -> str | None:
    """Why there is no kernel on a CPU that multiplies so with the integers of this grid, or None."""
    if product is Product.packed:
        return f"group_size must be 0 or a multiple of 32, got {grid.group_size}" if grid.group_size % 32 else None
    if grid.bits == 8 and grid.group_size:
        return f"torch's int8 kernel has one scale per row: group_size must be 0, got {grid.group_size}"
    if grid.bits == 4 and grid.group_size not in INT4_GROUPS:
        groups = ", ".join(map(str, INT4_GROUPS))
        return f"torch's int4 kernel has groups of {groups}: group_size must be one of them, got {grid.group_size}"
    return None


class Float(nn.Module):
    """x (T, C) -> x W' + bias, (T, R)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = fixed(weight)
        self.bias = None if bias is None else fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        if not alone(x):
            return F.linear(x, self.weight, self.bias)
        y = summed(self.weight, x).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8(nn.Module):
    """As `Float`, of q (R, C) int8 and a scale (R, 1) for each row. dtype: of the activations."""

    def __init__(
        self, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, product: Product = Product.widened
    ) -> None:
        super().__init__()
        self.product, self.numbers, self.missing = product, q.numel(), -q.shape[1] % INT8_COLUMNS
        self.q, self.scale = fixed(F.pad(q, (0, self.missing))), fixed(exact(scale.flatten(), dtype))
        self.bias = None if bias is None else fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.missing)) if self.missing else x
        if self.product is Product.rounded and len(x) > 1:
            q, step = rounded(x)
            y = (torch._int_mm(q, self.q.t()).float() * step * self.scale.float()).to(x.dtype)
        elif alone(x):
            y = (summed(self.q, x) * self.scale.float()).to(x.dtype)
        else:
            y = torch.ops.aten._weight_int8pack_mm(x, self.q, self.scale)
        return y if self.bias is None else y + self.bias


class Int4(nn.Module):
    """As `Float`, of q (R, C) in -8..7 as int8 and a scale (R, groups) for each group. dtype: of the activations."""

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.group = len(q), q.shape[1] // scale.shape[1]
        missing = -len(q) % INT4_ROWS
        q, scale = (F.pad(values, (0, 0, 0, missing)) for values in (q, scale))
        pairs = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1)  # (groups, R, 2): scale and zero
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)  # (R, C / 2) uint8
        self.packed, self.scales = fixed(packed), fixed(exact(pairs, dtype).contiguous())
        self.bias = None if bias is None else fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scales)[:, : self.rows]
        return y if self.bias is None else y + self.bias


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, C) -> integers of -127 to 127 (T, C) int8 and their scales (T, 1) float32, to nearest, ties to even."""
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return (x / step).round().to(torch.int8), step


def alone(x: Tensor) -> bool:
    """Whether a token comes by itself, to be multiplied in a loop over rows that the compiler makes of a sum.

    What counts then is how fast the matrix is read: 2.5 times as fast as by torch's products in bfloat16, 2.8 times in
    int8 (docs/log.md). (int4 has none: a loop that takes the bits apart was no faster than torch's product.)
    """
    return len(x) == 1 and x.device.type == "cpu" and torch.compiler.is_compiling()


def summed(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (R, C) and x (1, C) -> their product (1, R) in float32, as one loop that sums several rows at a time.

    A row's sum waits for itself, from one addition to the next; four rows do not wait for each other, and share x.
    """
    x = x.float()
    return torch.cat([(part.float() * x).sum(-1) for part in matrix.chunk(TOGETHER)])[None]


def exact(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales in `dtype`. Raises `UserError` unless it holds them exactly."""
    rounded = scale.to(dtype)
    if not bool((rounded.float() == scale.float()).all()):
        raise UserError(f"scales must be exact in {str(dtype).removeprefix('torch.')}, got some that are not")
    return rounded


class Stored:
    """A variant's tensors by their names in the checkpoint, held against its config. dtype: of those that are floats.
    product: how integers on a grid are multiplied.

    Raises `UserError` where a tensor is missing, of another shape than the config says, or not finite.
    """

    def __init__(self, variant: Checkpoint, dtype: torch.dtype, product: Callable[[Grid], Product]) -> None:
        self.product = product
        model = outline(read_shape(variant.config))
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.tensors, self.grid, self.dtype, self.path = variant.tensors(), grid_of(variant), dtype, variant.path

    def floats(self, name: str) -> Tensor:
        """A tensor that is no integers: (R, C) or (R)."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: model.safetensors lacks {name}")
        values = self.tensors[name]
        self.check(name, values.shape, values)
        return values.to(self.dtype)

    def check(self, name: str, shape: torch.Size, values: Tensor) -> None:
        if shape != self.shapes[name]:
            raise UserError(
                f"{self.path}: tensor {name} must be {self.shapes[name]} by config.json, got {tuple(shape)}"
            )
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"{self.path}: tensor {name} holds NaN or infinite values")

    def matrix(self, *names: str) -> nn.Module:
        """Matrices (without `.weight`) with the same input, as one below each other."""
        bias = self.biases(*names)
        if f"{names[0]}.weight_packed" not in self.tensors:
            return Float(torch.cat([self.floats(f"{name}.weight") for name in names]), bias)
        if self.grid is None:
            raise UserError(f"{self.path}: the checkpoint stores integers but its manifest declares no grid")
        parts = [self.integers(name, self.grid) for name in names]
        q, scale = (torch.cat(values) for values in zip(*parts, strict=True))
        grid = self.grid.of(names[0])
        product = self.product(grid)
        if product is Product.packed:
            return Packed(q, scale, bias, grid.bits)
        if grid.bits == 8:
            return Int8(q, scale, bias, self.dtype, product)
        return Int4(q, scale, bias, self.dtype)

    def integers(self, name: str, grid: Grid | Grids) -> tuple[Tensor, Tensor]:
        """q (R, C) int8 and its scales (R, groups)."""
        q, scale = integers(self.tensors, name, grid)
        self.check(f"{name}.weight", q.shape, scale)
        return q, scale

    def biases(self, *names: str) -> Tensor | None:
        """Their biases one after the other, with zeros for those that have none; None if nobody has one."""
        if not any(f"{name}.bias" in self.shapes for name in names):
            return None
        parts = [
            self.floats(f"{name}.bias")
            if f"{name}.bias" in self.shapes
            else torch.zeros(self.shapes[f"{name}.weight"][0], dtype=self.dtype)
            for name in names
        ]
        return torch.cat(parts)
