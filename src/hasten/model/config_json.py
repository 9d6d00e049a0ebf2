"""A decoder's shape as Hugging Face's `config.json`, and back. It needs no torch.

What is written has the fields of transformers 4, which 5 opens too; what is read may be of either.
A field that is absent means what the family's own implementation takes it to mean; one that would change the
arithmetic in a way this decoder does not compute is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.model.config import LAYER_TYPES, Activation, ModelConfig, RopeKind, RopeScaling


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture: its class, and what its `config.json` means where it says nothing.

    kv_heads: None means as many as there are heads. head_width: 0 means hidden_size / heads.
    """

    architecture: str
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    tied_head: bool = False
    kv_heads: int | None = None
    head_width: int = 0


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", kv_heads=8),
    "qwen2": Family("Qwen2ForCausalLM", kv_heads=32),
    "qwen3": Family("Qwen3ForCausalLM", kv_heads=32, head_width=128),
    "gemma3_text": Family("Gemma3ForCausalLM", rope_theta=1_000_000.0, tied_head=True, kv_heads=4, head_width=256),
}
"""What this decoder computes, by `model_type`."""

# Fields that change the arithmetic, with the values that leave it as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1),
    "add_cross_attention": (None, False),
    "per_layer_config": (None,),
}
MOST_LAYERS = 10_000  # a list has an entry for each: a damaged number must not fill the memory
WINDOW = 4096  # where a family that slides does not say how far
QWEN_FULL_LAYERS = 28  # of a Qwen without max_window_layers: those before it attend to everything
GEMMA_PERIOD = 6  # of an early Gemma 3 config without layer_types: every sixth layer is global
LOCAL_ROPE_THETA = 10000.0
ACTIVATIONS = {"silu": Activation.silu, "swish": Activation.silu, "gelu_pytorch_tanh": Activation.gelu_tanh}


def to_huggingface(config: ModelConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Json:
    """`config.json` of a checkpoint with this shape."""
    name = config.family
    gemma = name == "gemma3_text"
    activation = "gelu_pytorch_tanh" if config.activation is Activation.gelu_tanh else "silu"
    found: Json = {
        "architectures": [FAMILIES[name].architecture],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        ("hidden_activation" if gemma else "hidden_act"): activation,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "use_cache": True,
        "dtype": "float32",
    }
    if name == "qwen2":
        del found["attention_bias"]  # always on q, k and v there
        if config.head_width * config.heads == config.hidden_size:
            del found["head_dim"]  # as Qwen leaves it out
    if name == "mistral":
        del found["attention_bias"]
    if name != "llama":
        del found["mlp_bias"]
        found["sliding_window"] = config.sliding_window or None
    if name in ("qwen2", "qwen3", "gemma3_text"):
        found |= layer_fields(config)
    if gemma:
        found |= {
            "sliding_window": config.sliding_window or config.context,
            "query_pre_attn_scalar": round(config.score_scale**-2),
            "rope_local_base_freq": config.local_rope_theta or config.rope_theta,
        }
    return found | _rope_to_huggingface(config)


def layer_fields(config: ModelConfig) -> Json:
    """What `config.json` of a Qwen or a Gemma says of single layers; empty for a family whose layers are all alike."""
    slides = [config.slides(layer) for layer in range(config.layers)]
    types = {"layer_types": ["sliding_attention" if one else "full_attention" for one in slides]}
    if config.family == "gemma3_text":
        return types
    if config.family not in ("qwen2", "qwen3"):
        return {}
    # max_window_layers is for readers older than layer_types: it can only say from which layer on all slide
    first = slides.index(True) if any(slides) else config.layers
    return types | {"use_sliding_window": any(slides), "max_window_layers": first}


def _rope_to_huggingface(config: ModelConfig) -> Json:
    scaling = config.rope_scaling
    if scaling.kind is RopeKind.default:
        return {}
    found: Json = {"rope_type": scaling.kind.name, "factor": scaling.factor}
    if scaling.kind is RopeKind.llama3:
        found |= {
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {"rope_scaling": found}


def check_family(config: Json) -> str:
    """The `model_type` of a `config.json`. Raises `UserError` with the list of what is covered for any other."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        named = config.get("architectures")
        shown = f" (architectures {_shown(named)})" if named else ""
        raise UserError(f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {_shown(name)}{shown}")
    return name


def from_huggingface(config: Json) -> ModelConfig:
    """Our shape of a `config.json`. Raises `UserError` for what this decoder does not compute."""
    name = check_family(config)
    family = FAMILIES[name]
    gemma = name == "gemma3_text"
    _check_neutral(config)
    layers = _whole(config, "num_hidden_layers", most=MOST_LAYERS)
    heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    context = _whole(config, "max_position_embeddings")
    head_size = _whole(config, "head_dim", family.head_width)
    attention_bias = name not in ("mistral", "qwen2") and _flag(config, "attention_bias", False)
    window = _window(name, config, context)
    types = _layer_types(name, config, layers, window)
    slides = "sliding_attention" in types
    full, local = _ropes(config, gemma)
    scalar = _whole(config, "query_pre_attn_scalar", 256) if gemma else 0
    return ModelConfig(
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, family, heads),
        head_size=head_size,
        feed_forward_size=_whole(config, "intermediate_size"),
        vocab_size=_whole(config, "vocab_size"),
        context=context,
        rope_theta=_theta(full, config, "rope_theta", family.rope_theta),
        norm_epsilon=_number(config, "rms_norm_eps", family.norm_epsilon),
        tied_head=_flag(config, "tie_word_embeddings", family.tied_head),
        initializer_range=_number(config, "initializer_range", 0.02),
        qkv_bias=attention_bias or name == "qwen2",
        output_bias=attention_bias,
        mlp_bias=name == "llama" and _flag(config, "mlp_bias", False),
        head_norm=gemma or name == "qwen3",
        post_norms=gemma,
        offset_norms=gemma,
        embedding_scale=gemma,
        attention_scale=float(scalar) ** -0.5 if gemma and scalar != (head_size or hidden // heads) else 0.0,
        activation=_activation(config, gemma),
        sliding_window=window if window and slides else 0,
        layer_types=types if slides and "full_attention" in types else [],
        local_rope_theta=_theta(local, config, "rope_local_base_freq", LOCAL_ROPE_THETA) if gemma else 0.0,
        rope_scaling=_rope_scaling(full, {} if gemma else config, context),
    )


def _check_neutral(config: Json) -> None:
    for field, neutral in NEUTRAL.items():
        if config.get(field) not in neutral:
            raise UserError(f"config.json: {field} must be absent or null, got {_shown(config[field])}")


def _shown(value: Any) -> str:
    """A value from a file, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _whole(config: Json, field: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    """A whole number from 1 on, or its default where it is absent or null."""
    value = config.get(field)
    if value is None:
        if default is None:
            raise UserError(f"config.json lacks {field}")
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"config.json: {field} must be a whole number, got {_shown(value)}")
    if not 1 <= value <= most:
        raise UserError(f"config.json: {field} must be 1 to {most}, got {_shown(value)}")
    return value


def _number(config: Json, field: str, default: float | None = None) -> float:
    value = config.get(field)
    if value is None:
        if default is None:
            raise UserError(f"config.json lacks {field}")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise UserError(f"config.json: {field} must be a finite number, got {_shown(value)}")
    return float(value)


def _flag(config: Json, field: str, default: bool) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {field} must be true or false, got {_shown(value)}")
    return default if value is None else value


def _kv_heads(config: Json, family: Family, heads: int) -> int:
    """Absent and null differ: the first is the family's own number, the second as many as there are heads."""
    absent = heads if family.kv_heads is None else family.kv_heads
    return _whole(config, "num_key_value_heads", heads if "num_key_value_heads" in config else absent)


def _activation(config: Json, gemma: bool) -> Activation:
    field, wanted = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    value = config.get(field, wanted)
    found = ACTIVATIONS.get(value) if isinstance(value, str) else None
    if found is not ACTIVATIONS[wanted]:
        raise UserError(f"config.json: {field} must be {wanted!r}, got {_shown(value)}")
    return found


def _window(name: str, config: Json, context: int) -> int | None:
    """How far sliding layers see; None if none does."""
    if name in ("qwen2", "qwen3") and not _flag(config, "use_sliding_window", False):
        return None
    if config.get("sliding_window", 0) is None:
        return None
    window = _whole(config, "sliding_window", WINDOW if name != "llama" else context)
    if name != "llama":
        return window
    if window < context:
        raise UserError(f"config.json: sliding_window must be null, as no llama slides, got {window}")
    return None


def _layer_types(name: str, config: Json, layers: int, window: int | None) -> list[str]:
    """What each layer attends to."""
    usual = _usual_layer_types(name, config, layers, window)
    types = config.get("layer_types")
    types = usual if types is None else types
    if not isinstance(types, list) or not all(one in LAYER_TYPES for one in types):
        raise UserError(f"config.json: layer_types must list {' and '.join(LAYER_TYPES)} alone, got {_shown(types)}")
    if len(types) != layers:
        raise UserError(f"config.json: layer_types must name each of the {layers} layers, got {len(types)}")
    if name in ("llama", "mistral") and types != usual:
        raise UserError(f"config.json: layer_types must all be {usual[0]}, got {_shown(types)}")
    if "sliding_attention" in types and window is None:
        raise UserError("config.json: sliding_window must be set and in use where a layer is sliding_attention")
    return list(types)


def _usual_layer_types(name: str, config: Json, layers: int, window: int | None) -> list[str]:
    """What a family's layers attend to where `layer_types` does not say."""
    if name == "gemma3_text":
        period = _whole(config, "sliding_window_pattern", GEMMA_PERIOD)
        slides = [(layer + 1) % period != 0 for layer in range(layers)]
    elif name in ("qwen2", "qwen3"):
        # 0 is fine here: every layer slides
        first = 0 if config.get("max_window_layers") == 0 else _whole(config, "max_window_layers", QWEN_FULL_LAYERS)
        slides = [window is not None and layer >= first for layer in range(layers)]
    else:
        slides = [window is not None] * layers
    return ["sliding_attention" if one else "full_attention" for one in slides]


def _ropes(config: Json, gemma: bool) -> tuple[Json, Json]:
    """The rotary parameters of global and of local layers.

    transformers 4 has `rope_scaling`, flat; transformers 5 `rope_parameters`, for Gemma by layer type. Where both are
    there, the former wins.
    """
    scaling, parameters = _object(config, "rope_scaling"), _object(config, "rope_parameters")
    by_type = any(kind in parameters for kind in LAYER_TYPES)
    if any(kind in scaling for kind in LAYER_TYPES) or by_type != (gemma and bool(parameters)):
        raise UserError("config.json: rope_parameters must be by layer type in a gemma3_text and in no other")
    if not gemma:
        return scaling or parameters, {}
    local = _object(parameters, "sliding_attention")
    if _rope_kind(local) is not RopeKind.default:
        raise UserError(f"config.json: rope_type of sliding_attention must be default, got {_rope_kind(local).name!r}")
    return {**_object(parameters, "full_attention"), **scaling}, local


def _object(config: Json, field: str) -> Json:
    found = config.get(field)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"config.json: {field} must be an object or null, got {_shown(found)}")
    return found or {}


def _theta(rope: Json, config: Json, field: str, default: float) -> float:
    """A rotary base: of the rotary parameters, else of a field beside them."""
    theta = _number(rope, "rope_theta", _number(config, field, default))
    if theta < 1:
        raise UserError(f"config.json: {field} must be at least 1, got {theta}")
    return theta


def _rope_kind(rope: Json) -> RopeKind:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in RopeKind.__members__:
        raise UserError(f"config.json: rope_type must be one of {', '.join(RopeKind.__members__)}, got {_shown(kind)}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        given = _shown(rope["partial_rotary_factor"])
        raise UserError(f"config.json: partial_rotary_factor must be absent or null, got {given}")
    return RopeKind[kind]


def _rope_scaling(rope: Json, outer: Json, context: int) -> RopeScaling:
    """outer: what may say beside the rotary parameters, and before them, how long the original context was."""
    kind = _rope_kind(rope)
    if kind is RopeKind.default:
        return RopeScaling()
    if kind is RopeKind.linear:
        return RopeScaling(kind, _number(rope, "factor"))
    field = "original_max_position_embeddings"
    return RopeScaling(
        kind,
        _number(rope, "factor"),
        _number(rope, "low_freq_factor"),
        _number(rope, "high_freq_factor"),
        _whole(outer, field, _whole(rope, field, context)),
    )
