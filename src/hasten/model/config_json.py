"""A decoder's shape as Hugging Face's `config.json`, and back. It needs no torch."""

from __future__ import annotations

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.model.config import ModelConfig


def to_huggingface(config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Json:
    """`config.json` of a Llama with this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "use_cache": True,
        "dtype": "float32",
    }


def from_huggingface(config: Json) -> ModelConfig:
    """Our shape of a `config.json`. Raises `UserError` for what this decoder does not compute."""
    if config.get("model_type") != "llama":
        raise UserError(f"config.json: model_type must be llama, got {config.get('model_type')!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rope_type must be default, got {kind!r}")
    for field, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(field, wanted) != wanted:
            raise UserError(f"config.json: {field} must be {wanted!r}, got {config[field]!r}")
    try:
        return ModelConfig(
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_size=config.get("head_dim") or 0,
            feed_forward_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            context=config["max_position_embeddings"],
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            norm_epsilon=config["rms_norm_eps"],
            tied_head=config.get("tie_word_embeddings", False),
            initializer_range=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from None
    except TypeError as error:
        raise UserError(f"config.json holds a value of the wrong type: {error}") from None
