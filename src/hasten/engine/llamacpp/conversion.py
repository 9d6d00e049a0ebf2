"""llama.cpp's own four bits: what its users get from its converter, as a baseline that hasten's variants have to beat.

`Q4_0` rounds every matrix to blocks of 32 with one scale. `Q4_K_M` is the mixture that most published models come in:
blocks of 256 whose 8 parts have a scale and an offset of 6 bits each (Q4_K, 4.5 bits per weight), and Q6_K (6.6 bits)
for the head, and for the value and down matrices of the first eighth, the last eighth and every third layer between;
where a row is no multiple of 256, Q5_0 and Q8_0 instead (llama.cpp, `src/llama-quant.cpp`). Which matrix gets which
type is written down here; the rounding is done by the wheel's `ggml_quantize_chunk`, without an importance matrix.

    python pipelines/evaluate.py engine=llamacpp engine.conversion=Q4_K_M
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Checkpoint
from hasten.engine.base import Dtype
from hasten.engine.gguf import BLOCK, FLOATS, Encoder, tensors_of
from hasten.engine.gguf_layout import Entry

if TYPE_CHECKING:
    import numpy as np
    import torch

SUPER_BLOCK = 256
"""Weights of a Q4_K or Q6_K block."""
INSTEAD = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""Where rows are no multiple of that."""


class Conversion(Enum):
    """Four bits by llama.cpp's own rounding, or none: the variant's own numbers."""

    none = "none"
    Q4_0 = "Q4_0"
    Q4_K_M = "Q4_K_M"


@dataclass(frozen=True)
class Converter(Encoder):
    """Rounds a float checkpoint's matrices as llama.cpp does. layers, tied: of the model."""

    conversion: Conversion
    layers: int
    tied: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, conversion: Conversion) -> Converter:
        from hasten.model.config_json import from_huggingface

        config = from_huggingface(checkpoint.config)
        return cls(tensors_of(checkpoint), None, Dtype.float16, conversion, config.layers, config.tied_head)

    @property
    def format(self) -> str:
        return self.conversion.value

    def kind(self, entry: Entry) -> str:
        if len(entry.shape) != 2:
            return "F32"
        if self.conversion is Conversion.Q4_0:
            kind = "Q6_K" if self.is_head(entry.name) else "Q4_0"
        else:
            kind = "Q6_K" if self.deserves_more(entry.name) else "Q4_K"
        if kind in INSTEAD and entry.shape[1] % SUPER_BLOCK:
            kind = INSTEAD[kind]
        return "F16" if entry.shape[1] % BLOCK else kind

    def is_head(self, name: str) -> bool:
        """A tied head is the embedding."""
        return name == "output" or (self.tied and name == "token_embd")

    def deserves_more(self, name: str) -> bool:
        """Whether Q4_K_M spends six bits on a matrix."""
        if name in ("token_embd", "output"):
            return self.is_head(name)
        _, number, part = name.split(".")
        layer, eighth = int(number), self.layers // 8
        more = layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
        return part in ("attn_v", "ffn_down") and more

    def _floats(self, entry: Entry, weight: torch.Tensor) -> np.ndarray[Any, Any]:
        kind = self.kind(entry)
        if kind in FLOATS.values():
            return super()._floats(entry, weight)
        return rounded(weight.float().contiguous().numpy(), kind)


def rounded(weight: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """(out, in) float32 as rows of bytes of a GGUF type, by llama.cpp's own code."""
    import gguf
    import numpy as np
    import xllamacpp.xllamacpp as wheel

    type_ = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    rows, columns = weight.shape
    made = np.empty((rows, columns // per_block * block_bytes), np.uint8)
    convert = ctypes.CDLL(wheel.__file__).ggml_quantize_chunk
    convert.restype = ctypes.c_size_t
    convert.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    )  # fmt: skip
    size = convert(int(type_), weight.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    assert size == made.nbytes
    return made
