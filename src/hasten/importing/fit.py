"""Whether a checkpoint's tensors are those its `config.json` asks for, by arithmetic: nothing is built or allocated."""

from __future__ import annotations

from dataclasses import replace

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.importing.weights import Stored, shown
from hasten.model.config import ModelConfig
from hasten.model.config_json import FAMILIES, check_family, from_huggingface

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Shapes = dict[str, tuple[int, ...]]


def check_config(config: Json) -> None:
    """Raises `UserError` for a checkpoint that is no plain one of a covered architecture."""
    if config.get("auto_map"):
        raise UserError(
            "config.json: auto_map names code of the checkpoint's own, which is never run; covered are the "
            f"architectures {', '.join(FAMILIES)}"
        )
    check_family(config)
    if config.get("quantization_config"):
        given = config["quantization_config"]
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise UserError(
            f"config.json: quantization_config must be absent, got {method!r}; import the float checkpoint and "
            "quantise it here"
        )


def fitting_shape(config: Json, stored: dict[str, Stored]) -> ModelConfig:
    """The shape in `config.json`. Raises `UserError` if the tensors are not those of that shape.

    A head that is stored although it is tied counts as tied here; `checkpoint.untie` looks at its values.
    """
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(stored):  # before a list as long as that is made of it
        raise UserError(f"config.json: num_hidden_layers is {layers}, the weights hold {len(stored)} tensors in all")
    shape = from_huggingface(config)
    expected = expected_shapes(shape)
    optional = {HEAD: expected[EMBEDDING]} if shape.tied_head else {}
    if absent := expected.keys() - stored.keys():
        raise UserError(f"the weights lack {shown(absent)}, which config.json asks for")
    if surplus := stored.keys() - expected.keys() - optional.keys():
        raise UserError(f"config.json has no place for {shown(surplus)} of the weights")
    for name, wanted in (expected | optional).items():
        if name in stored and stored[name].shape != wanted:
            raise UserError(
                f"{name} must be {_sizes(wanted)} by config.json, the weights hold {_sizes(stored[name].shape)}"
            )
    return shape


def expected_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of a checkpoint with that shape; a tied head is stored once."""
    found: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size), "model.norm.weight": (config.hidden_size,)}
    if not config.tied_head:
        found[HEAD] = found[EMBEDDING]
    block = _block_shapes(config)
    for layer in range(config.layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return found


def _block_shapes(config: ModelConfig) -> Shapes:
    hidden, inner, width = config.hidden_size, config.feed_forward_size, config.head_width
    queries, keys = config.heads * width, config.kv_heads * width
    projections = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.head_norm:
        norms |= {"self_attn.q_norm": width, "self_attn.k_norm": width}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    found: Shapes = {f"{name}.weight": (size,) for name, size in norms.items()}
    for name, (out, into, bias) in projections.items():
        found[f"{name}.weight"] = (out, into)
        if bias:
            found[f"{name}.bias"] = (out,)
    return found


def untied(shape: ModelConfig) -> ModelConfig:
    """The same shape with a head of its own."""
    return replace(shape, tied_head=False)


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
