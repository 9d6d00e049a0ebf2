"""A variant as a GGUF file, its integers packed bit for bit into llama.cpp's own blocks.

GGUF is llama.cpp's file format: metadata, the tokenizer and the tensors, ready to be mapped into
memory. A symmetric 8-bit grid whose groups are multiples of 32 *is* Q8_0, and a 4-bit one is Q4_0:
both store blocks of 32 integers behind one float16 scale, so a group of 64 or 128 repeats its scale.
Nothing is rounded: what llama.cpp multiplies with equals `hasten.model.grid.dequantise` exactly.

Layout of a block of 32: Q8_0 is `scale, q[0..31]` (34 bytes, 8.5 bits per weight); Q4_0 is `scale`
and 16 bytes, byte i holding q[i] + 8 in its low and q[i + 16] + 8 in its high half (18 bytes, 4.5 bits).

Which tensor goes where, and what llama.cpp computes otherwise, is in `hasten.engine.gguf_layout`. Where it turns other
pairs of a head in RoPE, rows change places, integers and scales alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import SCHEMA, Checkpoint, Json
from hasten.engine.base import Dtype, Support
from hasten.engine.gguf_layout import Entry, architecture, describe, entries, refusal, usable_context
from hasten.engine.gguf_vocabulary import Vocabulary, id_vocabulary, read_vocabulary
from hasten.engine.grids import every
from hasten.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hasten.model.config import ModelConfig
    from hasten.model.grid import Grid, Grids

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

FORMAT = 2
"""Part of the cache key: raise it when the same variant would be written as other bytes."""
BLOCK = 32
FLOATS = {Dtype.float32: "F32", Dtype.float16: "F16", Dtype.bfloat16: "BF16"}
INTEGERS = {4: "Q4_0", 8: "Q8_0"}


def unsupported(checkpoint: Checkpoint, max_context: int | None = None) -> str | None:
    """Why no GGUF can hold this checkpoint as it is, or None. Reads only its JSON files.

    max_context: tokens that will ever be attended to; None means as many as the model was made for.
    """
    from hasten.model.config_json import from_huggingface
    from hasten.model.grid import grid_of

    try:
        shape = from_huggingface(checkpoint.config)
        grid = grid_of(checkpoint)
    except UserError as error:
        return str(error)
    return refusal(shape, max_context) or (every(grid, _supports_grid).reason if grid else None)


def _supports_grid(grid: Grid) -> Support:
    kind = INTEGERS[grid.bits]
    if not grid.group_size or grid.group_size % BLOCK:
        needed = f"{kind} stores a scale for every {BLOCK} weights"
        return Support(reason=f"{needed}: group_size must be a multiple of {BLOCK}, got {grid.group_size}")
    return Support(native_format=kind)


def format_name(grid: Grid | Grids | None, weight_dtype: Dtype) -> str:
    """The GGUF type of the matrices: `Q8_0`, `Q4_0`, `F32`, `F16` or `BF16`; `Q4_0 and Q8_0` if there are several."""
    return str(every(grid, _supports_grid).native_format) if grid else FLOATS[weight_dtype]


def blocks(q: torch.Tensor, scale: torch.Tensor, bits: int) -> Bytes:
    """q (out, in) int8 and scale (out, groups) -> Q8_0 or Q4_0 rows, (out, in / 32 * block bytes).

    Raises `UserError` if float16 does not hold a scale exactly (compression's `portable_scale` makes it so).
    """
    import numpy as np

    out, columns = q.shape
    half = scale.float().half()
    if not bool((half.float() == scale.float()).all()):
        raise UserError("scales must be exact in float16 to be packed, got some that are not")
    repeats = columns // (scale.shape[1] * BLOCK)
    d = half.numpy().repeat(repeats, axis=1).view(np.uint8).reshape(out, -1, 2)
    values = q.contiguous().numpy().reshape(out, -1, BLOCK)
    if bits == 4:
        shifted = (values + 8).astype(np.uint8)
        packed = shifted[..., :16] | (shifted[..., 16:] << 4)
    else:
        packed = values.view(np.uint8)
    return np.concatenate([d, packed], axis=-1).reshape(out, -1)


def turn_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * D, ...) of a query or key matrix or bias in llama.cpp's order: pair (i, i + D/2) side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Encoder:
    """Turns a checkpoint's tensors into GGUF types, one at a time (the file may be larger than memory)."""

    tensors: dict[str, torch.Tensor]
    grid: Grid | Grids | None
    weight_dtype: Dtype

    @property
    def format(self) -> str:
        """What the file's format is called."""
        return format_name(self.grid, self.weight_dtype)

    def kind(self, entry: Entry) -> str:
        """The GGUF type of a tensor; norms and biases stay float32."""
        if self.has_integers(entry):
            if self.grid is None:
                raise UserError("the checkpoint stores integers but its manifest declares no grid")
            return INTEGERS[self.grid.of(entry.source).bits]
        return FLOATS[self.weight_dtype] if len(entry.shape) == 2 else "F32"

    def has_integers(self, entry: Entry) -> bool:
        """Whether the checkpoint stores a tensor on its grid."""
        return entry.part == "weight" and f"{entry.source}.weight_packed" in self.tensors

    def data(self, entry: Entry) -> np.ndarray[Any, Any]:
        """The bytes (uint8; float32 for F32). Raises `UserError` for a missing, misshapen or non-finite tensor."""
        from hasten.model.grid import integers

        if self.has_integers(entry):
            assert self.grid is not None
            q, scale = integers(self.tensors, entry.source, self.grid)
            self._check(entry, tuple(q.shape), scale)
            if entry.heads:
                q, scale = turn_pairs(q, entry.heads), turn_pairs(scale, entry.heads)
            return blocks(q, scale, self.grid.of(entry.source).bits)
        weight = self.tensors.get(f"{entry.source}.{entry.part}")
        if weight is None:
            raise UserError(f"model.safetensors lacks {entry.source}.{entry.part}")
        self._check(entry, tuple(weight.shape), weight)
        weight = turn_pairs(weight, entry.heads) if entry.heads else weight
        weight = weight.float() + 1 if entry.offset else weight
        weight = weight.float() * entry.factor if entry.factor != 1 else weight
        return self._floats(entry, weight)

    def _check(self, entry: Entry, shape: tuple[int, ...], values: torch.Tensor) -> None:
        if shape != entry.shape:
            raise UserError(f"{entry.source} must have shape {entry.shape} by config.json, got {shape}")
        if not bool(values.isfinite().all()):
            raise UserError(f"{entry.source} holds NaN or infinite values")

    def _floats(self, entry: Entry, weight: torch.Tensor) -> np.ndarray[Any, Any]:
        import numpy as np
        import torch

        kind = self.kind(entry)
        if kind == "F32":
            return weight.float().contiguous().numpy()
        small = weight.to(torch.float16 if kind == "F16" else torch.bfloat16).contiguous()
        if not bool(small.isfinite().all()):
            raise UserError(f"weight_dtype float16 cannot hold {entry.source}; use bfloat16 or float32")
        return small.view(torch.int16).numpy().view(np.uint8)


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, and those that GGUF has beside them."""
    from hasten.model.config_json import from_huggingface

    return {**checkpoint.tensors(), **rotary_divisors(from_huggingface(checkpoint.config))}


def write(
    checkpoint: Checkpoint, weight_dtype: Dtype, path: Path, *, text: bool = True, encoder: Encoder | None = None
) -> Json:
    """Write `checkpoint` to `path` as GGUF; what a reader of the file wants to know without opening it.

    weight_dtype: how floats are stored (norms and biases stay float32). text: with the checkpoint's tokenizer, a file
    for stock llama.cpp; otherwise every token is named by its id and none ends a text, a file that speaks ids only.
    encoder: what turns the checkpoint's tensors into GGUF's, if they are not to be packed as they are.
    Raises `UserError` if the checkpoint is corrupt or one that llama.cpp does not compute.
    """
    import gguf

    from hasten.model.config_json import from_huggingface
    from hasten.model.grid import grid_of

    config = from_huggingface(checkpoint.config)
    if reason := unsupported(checkpoint, usable_context(config)):
        raise UserError(f"{checkpoint.path} cannot be written as GGUF: {reason}")
    size = config.vocab_size
    vocabulary = read_vocabulary(checkpoint.path, size) if text else id_vocabulary(size)
    encoder = encoder or Encoder(tensors_of(checkpoint), grid_of(checkpoint), weight_dtype)
    # A tied head is the embedding, unless a method gave it integers of its own.
    head = not config.tied_head or "lm_head.weight_packed" in encoder.tensors
    plan = list(entries(config, head=head))
    writer = gguf.GGUFWriter(path, architecture(config))
    try:
        describe(writer, config, encoder.format)
        _tokenizer(writer, vocabulary)
        sizes = _write_tensors(writer, encoder, plan)
    finally:
        writer.close()
    per_layer = 2 * config.kv_heads * config.head_width
    embedding = sizes["token_embd.weight"]
    return {
        "schema": SCHEMA,
        "kind": "gguf",
        "format": encoder.format,
        "weight_bytes": sum(sizes.values()),
        # At batch 1 every tensor is read whole for a token, but only one row of an embedding that is not also the head.
        "weight_bytes_per_token": sum(sizes.values()) - (embedding * (size - 1) // size if head else 0),
        "kv_values_per_token": per_layer * config.layers,
        "sliding_values_per_token": per_layer * config.sliding_layers if architecture(config) == "gemma3" else 0,
        "sliding_window": config.sliding_window,
        "context": usable_context(config),
        "vocab_size": size,
    }


def rotary_divisors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """By what llama.cpp is to divide each rotary angle of a Llama 3, as a tensor; nothing for any other model."""
    from hasten.model.config import RopeKind, RopeScaling
    from hasten.model.decoder import frequencies

    if config.rope_scaling.kind is not RopeKind.llama3:
        return {}
    plain = frequencies(config.head_width, config.rope_theta, RopeScaling())
    return {"rope_freqs.weight": plain / frequencies(config.head_width, config.rope_theta, config.rope_scaling)}


def _write_tensors(writer: Any, encoder: Encoder, plan: list[Entry]) -> dict[str, int]:
    """Tensor bytes by GGUF name. First every header, then the data, so that one tensor is in memory at a time."""
    import gguf
    import numpy as np

    sizes: dict[str, int] = {}
    for entry in plan:
        kind = gguf.GGMLQuantizationType[encoder.kind(entry)]
        raw = kind != gguf.GGMLQuantizationType.F32
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*entry.shape[:-1], entry.shape[-1] // per_block * block_bytes) if raw else entry.shape
        dtype = np.dtype(np.uint8 if raw else np.float32)
        name = f"{entry.name}.{entry.part}"
        sizes[name] = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, sizes[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in plan:
        writer.write_tensor_data(encoder.data(entry))
    return sizes


def _tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    for kind, id_ in vocabulary.specials.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", id_)
    for flag, value in (("bos_token", False), ("eos_token", False), ("space_prefix", vocabulary.space_prefix)):
        writer.add_bool(f"tokenizer.ggml.add_{flag}", value)
