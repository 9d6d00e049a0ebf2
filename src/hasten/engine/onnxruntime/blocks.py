"""Our grids as MatMulNBits reads them: blocks along a row, each with one float32 scale.

MatMulNBits (ONNX Runtime's `com.microsoft` domain) multiplies unsigned integers, less a zero point that is the middle
of their range where none is given: 8 or 128, what our symmetric integers are shifted by. Its kernels know blocks of 16
to 256 weights. A group that is a multiple of such a block, a whole row among them, repeats its scale: nothing is
rounded, what is multiplied equals `hasten.model.grid.dequantise` exactly.

Two 4-bit integers share a byte, the first in its low half. A row that ends within a block is filled with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = (256, 128, 64, 32, 16)
"""How many weights may share a scale, in ONNX Runtime's CPU kernels."""


def block_size(group_size: int, columns: int) -> int:
    """The longest block that a grid's groups are made of, in a row of so many columns.

    group_size: 0 (a row is one group) or a multiple of 16.
    """
    return next((size for size in BLOCKS if (group_size or columns) % size == 0), BLOCKS[-1])


def packed(q: Tensor, bits: int, block: int) -> Tensor:
    """q (out, in) int8 -> (out, ceil(in / block), block * bits / 8) uint8."""
    filled = torch.nn.functional.pad(q, (0, -q.shape[1] % block)).view(q.shape[0], -1, block)
    unsigned: Tensor = (filled.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned
    return torch.bitwise_or(unsigned[..., ::2], unsigned[..., 1::2] << 4)


def scales(scale: Tensor, columns: int, block: int) -> Tensor:
    """scale (out, groups) -> one for each block, (out, ceil(in / block)) float32."""
    blocks = -(-columns // block)
    return scale.float().repeat_interleave(blocks // scale.shape[1], dim=1)
