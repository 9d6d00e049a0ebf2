"""A variant's weights in the order in which the native kernels read them (`cpp/kernels.hpp`).

Sixteen rows are a block; within it, what one 64-byte vector holds of each row lies side by side. Rows are padded to
whole blocks and columns to stretches of 32, with zeros. The integers are the variant's own, shifted to unsigned; a
group's scale is stored once, however long the group (llama.cpp's formats repeat it every 32 weights), so a 4-bit grid
with groups of 128 takes 4.125 bits per weight.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.grid import Grid, Grids, integers

LANES, STRETCH = 16, 32
KINDS = {"float32": 0, "bfloat16": 1, 8: 2, 4: 3}
FORMAT = 1
"""Part of the cache key: raise it when the same variant would be packed into other bytes."""


class Matrix(ctypes.Structure):
    """`Matrix` of cpp/kernels.hpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "rows", "columns", "group")),
        *((name, ctypes.c_void_p) for name in ("data", "scales", "bias")),
    ]


NORMS = ("before_attention", "after_attention", "before_feed", "after_feed", "query_norm", "key_norm")
MATRICES = ("qkv", "output", "gate_up", "down")


class Layer(ctypes.Structure):
    """`Layer` of cpp/model.hpp."""

    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        *((name, ctypes.c_void_p) for name in NORMS),
        ("window", ctypes.c_int32),
        ("rope", ctypes.c_int32),
    ]


SIZES = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "width",
    "feed",
    "vocabulary",
    "context",
    "slots",
    "batch",
    "threads",
    "guesses",
)


class Shape(ctypes.Structure):
    """`Shape` of cpp/model.hpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in (*SIZES, "gelu", "precision", "kept")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale", "embedding_scale")),
        ("layer", ctypes.POINTER(Layer)),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p * 2),
        ("sines", ctypes.c_void_p * 2),
    ]


@dataclass(frozen=True)
class Packed:
    """A matrix for the kernels. scales is empty for floats. bias (rows, padded) or empty."""

    kind: int
    rows: int
    columns: int
    group: int
    data: Tensor
    scales: Tensor
    bias: Tensor


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def in_blocks(weight: Tensor, together: int) -> Tensor:
    """(R, C) -> (blocks, C / together, 16, together): padded with zeros, `together` columns of a row side by side."""
    rows, columns = weight.shape
    filled = torch.nn.functional.pad(weight, (0, padded(columns, STRETCH) - columns, 0, padded(rows, LANES) - rows))
    blocks = filled.view(filled.shape[0] // LANES, LANES, -1, together)
    return blocks.transpose(1, 2).contiguous()


def packed_integers(q: Tensor, bits: int) -> Tensor:
    """q (R, C) int8 -> uint8 blocks. Padding is q = 0, which is the middle of the unsigned range."""
    unsigned: Tensor = (in_blocks(q, 8 if bits == 4 else 4).to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 8:
        return unsigned
    low, high = unsigned.unflatten(-1, (2, 4)).unbind(-2)
    return torch.bitwise_or(low, high << 4)


def packed_scales(scale: Tensor) -> Tensor:
    """(R, groups) float32 -> (blocks, groups, 16) float16. Raises `UserError` unless float16 holds them exactly."""
    half = scale.half()
    if not bool((half.float() == scale).all()):
        raise UserError("scales must be exact in float16 to be packed, got some that are not")
    return in_rows(half)


def in_rows(scale: Tensor) -> Tensor:
    rows = scale.shape[0]
    filled = torch.nn.functional.pad(scale, (0, 0, 0, padded(rows, LANES) - rows))
    return filled.view(-1, LANES, scale.shape[1]).transpose(1, 2).contiguous()


class Packer:
    """Packs a checkpoint's matrices by name. tensors: as stored. dtype: of those that are floats."""

    def __init__(self, tensors: dict[str, Tensor], grid: Grid | Grids | None, dtype: torch.dtype) -> None:
        self.tensors, self.grid, self.dtype = tensors, grid, dtype

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.tensors or f"{name}.weight_packed" in self.tensors

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias, float32."""
        return self.tensors[name].float()

    def matrix(self, *names: str, in_turns: bool = False) -> Packed:
        """Matrices with the same input as one: below each other, or block by block in turns."""
        parts = [self.one(name) for name in names]
        first = parts[0]
        if any((p.kind, p.columns, p.group) != (first.kind, first.columns, first.group) for p in parts):
            raise UserError(f"{' and '.join(names)} must be of one format to be multiplied together")
        if not in_turns and any(p.rows % LANES for p in parts[:-1]):
            return self.joined_by_row(*names)
        join = turns if in_turns else torch.cat
        biased = any(len(p.bias) for p in parts)
        biases = [p.bias if len(p.bias) else torch.zeros(padded(p.rows, LANES)) for p in parts]
        return Packed(
            first.kind,
            sum(padded(p.rows, LANES) for p in parts),
            first.columns,
            first.group,
            join([p.data for p in parts]),
            join([p.scales for p in parts]) if len(first.scales) else first.scales,
            join([bias.view(-1, LANES) for bias in biases]).flatten() if biased else torch.empty(0),
        )

    def one(self, name: str) -> Packed:
        return self.pack(name, *self.stored(name), self.bias(name))

    def joined_by_row(self, *names: str) -> Packed:
        """As `matrix`, where a matrix ends within a block."""
        stored = [self.stored(name) for name in names]
        scales = [scale for _, scale in stored if scale is not None]
        bias = torch.cat([self.bias(name) for name in names])
        values = torch.cat([values for values, _ in stored])
        return self.pack(names[0], values, torch.cat(scales) if scales else None, bias)

    def bias(self, name: str) -> Tensor:
        return self.vector(f"{name}.bias") if f"{name}.bias" in self.tensors else torch.empty(0)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Integers with their scales, or floats."""
        if f"{name}.weight_packed" in self.tensors:
            if self.grid is None:
                raise UserError("the checkpoint stores integers but its manifest declares no grid")
            return integers(self.tensors, name, self.grid)
        return self.vector(f"{name}.weight").to(self.dtype), None

    def pack(self, name: str, values: Tensor, scale: Tensor | None, bias: Tensor) -> Packed:
        """name: of a matrix on the same grid, if they are integers."""
        rows, columns = values.shape[0], padded(values.shape[1], STRETCH)
        if len(bias):
            bias = torch.nn.functional.pad(bias, (0, padded(rows, LANES) - rows))
        if scale is None:
            together = 1 if self.dtype is torch.float32 else 2
            kind = KINDS[str(self.dtype).removeprefix("torch.")]
            return Packed(kind, rows, columns, columns, in_blocks(values, together), torch.empty(0), bias)
        assert self.grid is not None
        grid = self.grid.of(name)
        bits, group = grid.bits, grid.group_size or columns
        return Packed(KINDS[bits], rows, columns, group, packed_integers(values, bits), packed_scales(scale), bias)


def turns(parts: list[Tensor]) -> Tensor:
    """Blocks of the first, the second, the first, ..."""
    return torch.stack(parts, dim=1).flatten(0, 1)


def packed_tensors(packer: Packer, config: ModelConfig) -> dict[str, Packed | Tensor]:
    """Everything the kernels read, by the names of `Shape` and of `Layer` (`0.qkv`). Vectors are float32."""
    offset = 1.0 if config.offset_norms else 0.0
    found: dict[str, Packed | Tensor] = {"norm": packer.vector("model.norm.weight") + offset}
    head = "lm_head" if packer.has("lm_head") else "model.embed_tokens"
    found["head"] = packer.matrix(head)
    if head == "lm_head":
        found["embedding"] = packer.matrix("model.embed_tokens")
    norms = {"before_attention": "input_layernorm"}
    if config.post_norms:
        norms |= {"after_attention": "post_attention_layernorm", "before_feed": "pre_feedforward_layernorm",
                  "after_feed": "post_feedforward_layernorm"}  # fmt: skip
    else:
        norms |= {"before_feed": "post_attention_layernorm"}
    if config.head_norm:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    for layer in range(config.layers):
        base = f"model.layers.{layer}"
        found[f"{layer}.qkv"] = packer.matrix(*(f"{base}.self_attn.{part}_proj" for part in "qkv"))
        found[f"{layer}.output"] = packer.matrix(f"{base}.self_attn.o_proj")
        found[f"{layer}.gate_up"] = packer.matrix(
            *(f"{base}.mlp.{part}_proj" for part in ("gate", "up")), in_turns=True
        )
        found[f"{layer}.down"] = packer.matrix(f"{base}.mlp.down_proj")
        found |= {
            f"{layer}.{ours}": packer.vector(f"{base}.{theirs}.weight") + offset for ours, theirs in norms.items()
        }
    return found
