"""A variant as a GGUF file, its integers packed bit for bit into llama.cpp's own blocks.

GGUF is llama.cpp's file format: metadata, the tokenizer and the tensors, ready to be mapped into
memory. A symmetric 8-bit grid whose groups are multiples of 32 *is* Q8_0, and a 4-bit one is Q4_0:
both store blocks of 32 integers behind one float16 scale, so a group of 64 or 128 repeats its scale.
Nothing is rounded: what llama.cpp multiplies with equals `hasten.model.grid.dequantise` exactly.

Layout of a block of 32: Q8_0 is `scale, q[0..31]` (34 bytes, 8.5 bits per weight); Q4_0 is `scale`
and 16 bytes, byte i holding q[i] + 8 in its low and q[i + 16] + 8 in its high half (18 bytes, 4.5 bits).

llama.cpp turns neighbouring pairs (2i, 2i + 1) of a head in RoPE where Hugging Face checkpoints turn
(i, i + D/2), so the rows of the query and key matrices, integers and scales alike, change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import SCHEMA, Checkpoint, Json
from hasten.engine.base import Dtype
from hasten.engine.gguf_vocabulary import Vocabulary, id_vocabulary, read_vocabulary
from hasten.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hasten.model.config import ModelConfig
    from hasten.model.grid import Grid

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

FORMAT = 1
"""Part of the cache key: raise it when the same variant would be written as other bytes."""
BLOCK = 32
FLOATS = {Dtype.float32: "F32", Dtype.float16: "F16", Dtype.bfloat16: "BF16"}
INTEGERS = {4: "Q4_0", 8: "Q8_0"}


def unsupported(checkpoint: Checkpoint) -> str | None:
    """Why no GGUF can hold this checkpoint as it is, or None. Reads only its JSON files."""
    model_type = checkpoint.config.get("model_type")
    if model_type != "llama":
        return f"only models of type llama can be written as GGUF, this one is {model_type!r}"
    grid = checkpoint.manifest.get("grid")
    if not grid:
        return None
    bits, group_size = grid.get("bits"), grid.get("group_size")
    if bits not in INTEGERS or not grid.get("symmetric", True):
        return f"llama.cpp has no format for {bits}-bit integers on this grid; it has symmetric 4-bit and 8-bit ones"
    if not group_size or group_size % BLOCK:
        needed = f"{INTEGERS[bits]} stores a scale for every {BLOCK} weights"
        return f"{needed}: group_size must be a multiple of {BLOCK}, got {group_size}"
    return None


def format_name(checkpoint: Checkpoint, weight_dtype: Dtype) -> str:
    """The GGUF type of the matrices: `Q8_0`, `Q4_0`, `F32`, `F16` or `BF16`."""
    grid = checkpoint.manifest.get("grid")
    return INTEGERS[grid["bits"]] if grid else FLOATS[weight_dtype]


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
    """Rows (heads * D, ...) of a query or key matrix in llama.cpp's order: pair (i, i + D/2) side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Entry:
    """One tensor: its names in the checkpoint and in GGUF, its shape, and the heads whose pairs turn (0: none)."""

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0


def entries(config: ModelConfig, *, head: bool) -> Iterator[Entry]:
    """Every tensor of a Llama, in the order of the file. head: it has an output matrix of its own."""
    width, hidden = config.head_width, config.hidden_size
    query, key, inner = config.heads * width, config.kv_heads * width, config.feed_forward_size
    yield Entry("model.embed_tokens", "token_embd", (config.vocab_size, hidden))
    for i in range(config.layers):
        source, name = f"model.layers.{i}", f"blk.{i}"
        yield Entry(f"{source}.input_layernorm", f"{name}.attn_norm", (hidden,))
        yield Entry(f"{source}.self_attn.q_proj", f"{name}.attn_q", (query, hidden), config.heads)
        yield Entry(f"{source}.self_attn.k_proj", f"{name}.attn_k", (key, hidden), config.kv_heads)
        yield Entry(f"{source}.self_attn.v_proj", f"{name}.attn_v", (key, hidden))
        yield Entry(f"{source}.self_attn.o_proj", f"{name}.attn_output", (hidden, query))
        yield Entry(f"{source}.post_attention_layernorm", f"{name}.ffn_norm", (hidden,))
        yield Entry(f"{source}.mlp.gate_proj", f"{name}.ffn_gate", (inner, hidden))
        yield Entry(f"{source}.mlp.up_proj", f"{name}.ffn_up", (inner, hidden))
        yield Entry(f"{source}.mlp.down_proj", f"{name}.ffn_down", (hidden, inner))
    yield Entry("model.norm", "output_norm", (hidden,))
    if head:
        yield Entry("lm_head", "output", (config.vocab_size, hidden))


@dataclass(frozen=True)
class Encoder:
    """Turns a checkpoint's tensors into GGUF types, one at a time (the file may be larger than memory)."""

    tensors: dict[str, torch.Tensor]
    grid: Grid | None
    weight_dtype: Dtype

    def kind(self, entry: Entry) -> str:
        """The GGUF type of a tensor; norms stay float32."""
        if f"{entry.source}.weight_packed" in self.tensors:
            if self.grid is None:
                raise UserError("the checkpoint stores integers but its manifest declares no grid")
            return INTEGERS[self.grid.bits]
        return FLOATS[self.weight_dtype] if len(entry.shape) == 2 else "F32"

    def data(self, entry: Entry) -> np.ndarray[Any, Any]:
        """The bytes (uint8; float32 for F32). Raises `UserError` for a missing, misshapen or non-finite tensor."""
        from hasten.model.grid import integers

        if self.kind(entry) in INTEGERS.values():
            assert self.grid is not None
            q, scale = integers(self.tensors, entry.source, self.grid)
            self._check(entry, tuple(q.shape), scale)
            if entry.heads:
                q, scale = turn_pairs(q, entry.heads), turn_pairs(scale, entry.heads)
            return blocks(q, scale, self.grid.bits)
        weight = self.tensors.get(f"{entry.source}.weight")
        if weight is None:
            raise UserError(f"model.safetensors lacks {entry.source}.weight")
        self._check(entry, tuple(weight.shape), weight)
        weight = turn_pairs(weight, entry.heads) if entry.heads else weight
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


def write(checkpoint: Checkpoint, weight_dtype: Dtype, path: Path, *, text: bool = True) -> Json:
    """Write `checkpoint` to `path` as GGUF; what a reader of the file wants to know without opening it.

    weight_dtype: how floats are stored (norms stay float32). text: with the checkpoint's tokenizer, a file
    for stock llama.cpp; otherwise every token is named by its id and none ends a text, a file that speaks
    ids only. Raises `UserError` if the checkpoint is corrupt or of another family.
    """
    import gguf

    from hasten.model.config_json import from_huggingface
    from hasten.model.huggingface import grid_of

    config = from_huggingface(checkpoint.config)
    size = config.vocab_size
    vocabulary = read_vocabulary(checkpoint.path, size) if text else id_vocabulary(size)
    encoder = Encoder(checkpoint.tensors(), grid_of(checkpoint), weight_dtype)
    # A tied head is the embedding, unless a method gave it integers of its own.
    head = not config.tied_head or "lm_head.weight_packed" in encoder.tensors
    plan = list(entries(config, head=head))
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _describe(writer, config, format_name(checkpoint, weight_dtype))
        _tokenizer(writer, vocabulary)
        sizes = _write_tensors(writer, encoder, plan)
    finally:
        writer.close()
    return {
        "schema": SCHEMA,
        "kind": "gguf",
        "format": format_name(checkpoint, weight_dtype),
        "weight_bytes": sum(sizes.values()),
        # At batch 1 every tensor is read whole for a token, but only one row of an embedding that is not also the head.
        "weight_bytes_per_token": sum(sizes.values()) - (sizes["token_embd"] * (size - 1) // size if head else 0),
        "kv_values_per_token": 2 * config.layers * config.kv_heads * config.head_width,
        "context": config.context,
        "vocab_size": size,
    }


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
        sizes[entry.name] = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(f"{entry.name}.weight", shape, dtype, sizes[entry.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in plan:
        writer.write_tensor_data(encoder.data(entry))
    return sizes


def _describe(writer: Any, config: ModelConfig, kind: str) -> None:
    """The hyperparameters llama.cpp reads. No names or dates: the same variant gives the same bytes."""
    import gguf

    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)


def _tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.model == "llama":
        # SentencePiece merges by score; the ids of a BPE vocabulary are in merge order.
        writer.add_token_scores([-float(id_) for id_ in range(len(vocabulary.tokens))])
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    for kind, id_ in vocabulary.specials.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", id_)
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        writer.add_bool(f"tokenizer.ggml.{flag}", False)
