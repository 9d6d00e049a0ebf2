"""A Gemma 3 out of a GGUF file: the way back from what llama.cpp's converter did.

The converter renames tensors, adds one to the norm weights (Hugging Face stores them less one) and quantises the
matrices: Q4_K, Q5_0, Q6_K and Q8_0 are blocks of integers with one or two scales each, and integer times scale is the
weight that llama.cpp multiplies with. These products are kept in bfloat16, the type that Gemma was published in: that
rounds each by at most 1 part in 512, where a 5-bit block was rounded by up to 1 part in 32 of its largest weight and an
8-bit block by 1 in 254. The norms, which were never quantised, become what they were in bfloat16 again. Queries and
keys keep their order: llama.cpp turns a Gemma's pairs as Hugging Face does.

Google's `config.json` says a few things that the file does not, because they are the architecture: every sixth layer
is global, the others turn by a base of 10000, scores are scaled by the width of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Json, write_json
from hasten.errors import UserError
from hasten.packaged.vocabulary import Piece, TokenType, write_tokenizer

if TYPE_CHECKING:
    import torch

GLOBAL_EVERY = 6
LOCAL_ROPE_THETA = 10000.0
CHUNK_VALUES = 2**24
"""How many weights are dequantised at a time: an embedding of 262,144 rows would fill 0.7 GB in float32."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def unpack(file: Path, folder: Path) -> None:
    """Write the Gemma in the GGUF `file` into `folder` as a Hugging Face directory.

    Raises `UserError` if the file is no Gemma 3 or the `gguf` library is missing.
    """
    try:
        import gguf
    except ImportError:
        raise UserError('gguf is not installed: pip install "hasten[cpu-engines]"') from None
    from safetensors.torch import save_file

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{file} is not a readable GGUF file: {error}") from None
    values: dict[str, Any] = dict(reader.fields)
    if _value(values, "general.architecture") != "gemma3":
        raise UserError(f"{file} must hold a gemma3, got {_value(values, 'general.architecture')!r}")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    write_json(folder / "config.json", config(values, tied))
    ids = special_ids(values)
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    unknown = {"unk_token_id": _value(values, "tokenizer.ggml.unknown_token_id")}
    specials = {name.removesuffix("_token_id"): int(id_) for name, id_ in {**ids, **unknown}.items()}
    write_tokenizer(folder, _pieces(values), specials)
    tensors = {_renamed(tensor.name): floats(tensor) for tensor in reader.tensors}
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})


def special_ids(values: dict[str, Any]) -> Json:
    """The ids that begin, end and pad a text, by their names in `config.json`."""
    roles = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{role}_token_id": _value(values, f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}


def config(values: dict[str, Any], tied: bool) -> Json:
    """`config.json` as Google writes it, from a GGUF's metadata."""

    def number(name: str) -> Any:
        return _value(values, f"gemma3.{name}")

    layers, width = number("block_count"), number("attention.key_length")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(values["tokenizer.ggml.tokens"].data),
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": width,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-6, which float32 cannot say
        "rope_theta": number("rope.freq_base"),
        "rope_local_base_freq": LOCAL_ROPE_THETA,
        "rope_scaling": None,
        "sliding_window": number("attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % GLOBAL_EVERY == 0 else "sliding_attention" for layer in range(layers)
        ],
        "query_pre_attn_scalar": width,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        **special_ids(values),
        "use_cache": True,
        "dtype": "bfloat16",
    }


def _value(values: dict[str, Any], name: str) -> Any:
    if name not in values:
        raise UserError(f"the GGUF file says nothing of {name}")
    return values[name].contents()


def _pieces(values: dict[str, Any]) -> list[Piece]:
    texts, scores, types = (values[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    return [Piece(*one) for one in zip(texts, scores, map(TokenType, types), strict=True)]


def _renamed(name: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER:
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    if len(parts) == 1 and parts[0] in TOP:
        return f"{TOP[parts[0]]}.weight"
    raise UserError(f"the GGUF file holds tensor {name}, which no Gemma 3 has")


def floats(tensor: Any) -> torch.Tensor:
    """A `gguf.ReaderTensor` in bfloat16, norms less one."""
    import gguf
    import numpy as np
    import torch

    shape = tuple(int(size) for size in reversed(tensor.shape))
    rows = tensor.data.reshape(shape[0], -1) if len(shape) == 2 else tensor.data.reshape(1, -1)
    step = max(1, CHUNK_VALUES // shape[-1])
    parts = []
    for first in range(0, len(rows), step):
        values = np.array(gguf.quants.dequantize(rows[first : first + step], tensor.tensor_type), dtype=np.float32)
        values = values - 1 if len(shape) == 1 else values
        parts.append(torch.from_numpy(values).to(torch.bfloat16))
    return torch.cat(parts).reshape(shape)
