"""Products by the kernels of `native` (`hasten.engine.native.build`), as an operator of torch.

They read 4 and 8 bits on every grid, packed in the order in which they are read, with activations rounded to 8 bits
with a scale for every 32: four products for each lane and instruction, where torch's own kernels widen each integer to
a float. They run in torch's own threads (OpenMP), which a team of theirs would compete with. The compiler knows of the
operator nothing but its shape; it costs some 7 microseconds a call, 49 times a token in twelve layers.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from hasten.engine.native import build
from hasten.engine.native.layout import KINDS, LANES, STRETCH, packed_integers, packed_scales, padded

LIBRARY = torch.library.Library("hasten", "FRAGMENT")
LIBRARY.define("multiply(Tensor x, Tensor data, Tensor scales, int bits, int rows, int columns, int group) -> Tensor")
_loaded: list[ctypes.CDLL] = []


def load(cache: Path) -> str:
    """Compile the kernels or find them again; what instructions they use. Raises `UserError` if that fails."""
    _loaded[:] = [build.product(cache)]
    return str(_loaded[0].hasten_kernels().decode())


def multiply(x: Tensor, data: Tensor, scales: Tensor, bits: int, rows: int, columns: int, group: int) -> Tensor:
    """x (T, C) float32 times a matrix as `Packed` holds it -> (T, R padded to whole blocks) float32."""
    x, out = x.contiguous(), x.new_empty(len(x), padded(rows, LANES))
    matrix = (KINDS[bits], rows, columns, group, data.data_ptr(), scales.data_ptr())
    _loaded[0].hasten_multiply(*matrix, x.data_ptr(), *x.shape, out.data_ptr(), torch.get_num_threads())
    return out


def described(x: Tensor, data: Tensor, scales: Tensor, bits: int, rows: int, columns: int, group: int) -> Tensor:
    """The shape of what `multiply` returns."""
    return x.new_empty(len(x), padded(rows, LANES))


LIBRARY.impl("multiply", multiply, "CPU")
torch.library.register_fake("hasten::multiply", described, lib=LIBRARY)


def fixed(values: Tensor) -> nn.Parameter:
    """A parameter that nothing trains."""
    return nn.Parameter(values, requires_grad=False)


class Product(Enum):
    """How integers are multiplied, and what is said of it where activations are rounded."""

    widened = "as floats, by torch's kernels"
    rounded = "int8 activations per token of a prompt"
    packed = "int8 activations per 32"


class Packed(nn.Module):
    """x (T, C) -> x W' + bias, (T, R), of q (R, C) in int8 and a scale (R, groups) for each group, any bits and groups.

    Raises `UserError` unless scales are exact in float16.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.bits, self.rows, self.columns = bits, len(q), padded(q.shape[1], STRETCH)
        self.product, self.numbers = Product.packed, q.numel()
        self.group = self.columns if scale.shape[1] == 1 else q.shape[1] // scale.shape[1]
        self.data, self.scales = fixed(packed_integers(q, bits).flatten()), fixed(packed_scales(scale).flatten())
        self.bias = None if bias is None else fixed(bias)

    def forward(self, x: Tensor) -> Tensor:
        matrix = (self.data, self.scales, self.bits, self.rows, self.columns, self.group)
        y: Tensor = torch.ops.hasten.multiply(x.float(), *matrix)[:, : self.rows].to(x.dtype)
        return y if self.bias is None else y + self.bias
