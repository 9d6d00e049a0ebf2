from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.model.config import Activation, ModelConfig, RopeKind, RopeScaling
from hasten.model.config_json import FAMILIES, from_huggingface, to_huggingface
from tests.model.families import BASE, CASES, FULL, LINEAR, LLAMA3, SLIDING, their_config
from tests.tiny import shape

IDS = {"bos_id": 0, "eos_id": 1, "pad_id": None}

# The `config.json` of released checkpoints (what bears on the shape), in the formats they were written in.
RELEASED: dict[str, tuple[Json, ModelConfig]] = {
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
            "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        ModelConfig(
            layers=16, hidden_size=2048, heads=32, kv_heads=8, head_size=64, feed_forward_size=8192,
            vocab_size=128256, context=131072, rope_theta=500000.0, norm_epsilon=1e-5, tied_head=True,
            rope_scaling=RopeScaling(RopeKind.llama3, 32.0, 1.0, 4.0, 8192),
        ),
    ),
    "SmolLM2-135M": (
        {
            "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
            "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_interleaved": False,
            "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
            "initializer_range": 0.041666666666666664, "attention_bias": False, "use_cache": True,
        },
        ModelConfig(
            layers=30, hidden_size=576, heads=9, kv_heads=3, feed_forward_size=1536, vocab_size=49152, context=8192,
            rope_theta=100000.0, norm_epsilon=1e-5, tied_head=True, initializer_range=0.041666666666666664,
        ),
    ),
    "Mistral-7B-v0.1": (
        {
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral",
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        ModelConfig(
            layers=32, hidden_size=4096, heads=32, kv_heads=8, feed_forward_size=14336, vocab_size=32000,
            context=32768, norm_epsilon=1e-5, tied_head=False, sliding_window=4096,
        ),
    ),
    "Qwen2.5-0.5B": (
        {
            "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
            "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        ModelConfig(
            layers=24, hidden_size=896, heads=14, kv_heads=2, feed_forward_size=4864, vocab_size=151936,
            context=32768, rope_theta=1e6, norm_epsilon=1e-6, tied_head=True, qkv_bias=True,
        ),
    ),
    "Qwen3-0.6B": (
        {
            "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
            "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
        },
        ModelConfig(
            layers=28, hidden_size=1024, heads=16, kv_heads=8, head_size=128, feed_forward_size=3072,
            vocab_size=151936, context=40960, rope_theta=1e6, norm_epsilon=1e-6, tied_head=True, head_norm=True,
        ),
    ),
    "gemma-3-270m": (
        {
            "_sliding_window_pattern": 6, "attention_bias": False, "attn_logit_softcapping": None, "head_dim": 256,
            "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
            "intermediate_size": 2048, "layer_types": ([SLIDING] * 5 + [FULL]) * 3, "model_type": "gemma3_text",
            "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 18,
            "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512,
            "use_bidirectional_attention": False, "vocab_size": 262144,
        },
        ModelConfig(
            layers=18, hidden_size=640, heads=4, kv_heads=1, head_size=256, feed_forward_size=2048,
            vocab_size=262144, context=32768, rope_theta=1e6, norm_epsilon=1e-6, tied_head=True, head_norm=True,
            post_norms=True, offset_norms=True, embedding_scale=True, activation=Activation.gelu_tanh,
            sliding_window=512, layer_types=([SLIDING] * 5 + [FULL]) * 3, local_rope_theta=10000.0,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_read_as_its_shape(name: str) -> None:
    config, expected = RELEASED[name]
    assert from_huggingface(config) == expected


@pytest.mark.parametrize("name", RELEASED)
def test_both_of_transformers_formats_mean_the_same(name: str) -> None:
    config, expected = RELEASED[name]
    theirs = as_transformers_reads(config)
    assert "rope_parameters" in theirs  # transformers 5 nests what transformers 4 wrote beside it
    assert comparable(from_huggingface(theirs)) == comparable(expected)
    ours = json.loads(json.dumps(to_huggingface(expected, **IDS)))
    assert comparable(from_huggingface(ours)) == comparable(expected)
    assert comparable(from_huggingface(as_transformers_reads(ours))) == comparable(expected)


@pytest.mark.parametrize("case", CASES)
def test_every_shape_survives_both_formats(case: str) -> None:
    family, changes = CASES[case]
    config = from_huggingface(their_config(family, **changes).to_dict())
    ours = json.loads(json.dumps(to_huggingface(config, **IDS)))
    assert from_huggingface(ours) == config
    assert comparable(from_huggingface(as_transformers_reads(ours))) == comparable(config)


def as_transformers_reads(config: Json) -> Json:
    """The same, as transformers understands it: every field there, its defaults filled in."""
    from transformers import AutoConfig

    fields = {key: value for key, value in json.loads(json.dumps(config)).items() if key != "model_type"}
    read: Json = AutoConfig.for_model(config["model_type"], **fields).to_dict()
    return read


def comparable(config: ModelConfig) -> Json:
    """0 and the width it stands for are the same."""
    return {**vars(config), "head_size": config.head_width}


REQUIRED = {
    "vocab_size": 97,
    "hidden_size": 3200,  # 100 a head: no family's default
    "intermediate_size": 56,
    "num_hidden_layers": 31,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
OPTIONAL: dict[str, list[Any]] = {
    "num_key_value_heads": [2, 32],
    "head_dim": [48],
    "rms_norm_eps": [1e-3],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "mlp_bias": [True],
    "rope_theta": [77.0],
    "rope_scaling": [None, {"type": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 3.0}],
    "sliding_window": [6, 8192],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 5, 40],
    "sliding_window_pattern": [1, 3],
    "_sliding_window_pattern": [3],
    "rope_local_base_freq": [55.0],
    "query_pre_attn_scalar": [168],
    "initializer_range": [0.5],
    "original_max_position_embeddings": [64],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_absent_means_what_transformers_takes_it_to_mean(family: str) -> None:
    config = {"model_type": family, **REQUIRED}
    assert comparable(from_huggingface(config)) == comparable(from_huggingface(as_transformers_reads(config)))


@settings(max_examples=150, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_any_fields_mean_what_transformers_takes_them_to_mean(family: str, data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(OPTIONAL)), max_size=7))
    chosen = {name: data.draw(st.sampled_from(OPTIONAL[name])) for name in sorted(names)}
    config = {"model_type": family, **REQUIRED, **chosen}
    assume(family != "gemma3_text" or "type" not in (config.get("rope_scaling") or {}))  # 4 read it, 5 passes it over
    try:
        shape = from_huggingface(config)
    except UserError as error:
        assert family == "llama" and "sliding_window must be null" in str(error)
        return
    assert comparable(shape) == comparable(from_huggingface(as_transformers_reads(config)))


def test_kv_heads_that_are_null_are_as_many_as_the_heads() -> None:
    for family in ("llama", "qwen2", "qwen3"):
        config = {"model_type": family, **REQUIRED, "num_key_value_heads": None}
        assert from_huggingface(config).kv_heads == as_transformers_reads(config)["num_key_value_heads"] == 32


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers() -> None:
    both = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {**LINEAR, "rope_theta": 5.0}}
    config = {"model_type": "llama", **REQUIRED, **both}
    read = from_huggingface(config)
    assert (read.rope_scaling.factor, read.rope_theta) == (2.0, 10000.0)
    assert comparable(read) == comparable(from_huggingface(as_transformers_reads(config)))


def test_a_llama3_stretch_without_its_original_context_takes_the_context() -> None:
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = {"model_type": "llama", **REQUIRED, "rope_scaling": rope}
    assert from_huggingface(config).rope_scaling.original_context == 4096
    outside = {**config, "original_max_position_embeddings": 64}
    assert from_huggingface(outside).rope_scaling.original_context == 64


def full(family: str, **changes: Any) -> Json:
    extra = {"head_dim": 12} if family in ("qwen3", "gemma3_text") else {}
    return {"model_type": family, **BASE, **extra, **changes}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            full("gpt2", architectures=["GPT2LMHeadModel"]),
            "llama, mistral, qwen2, qwen3, gemma3_text, got 'gpt2' (arch",
        ),
        (full("gemma3"), "model_type must be one of llama, mistral, qwen2, qwen3, gemma3_text, got 'gemma3'"),
        ({**BASE}, "got None"),
        ({**BASE, "model_type": ["llama"]}, "got ['llama']"),
        (full("llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type must be one of default, linear, l"),
        (full("qwen2", rope_parameters={"rope_type": "yarn"}), "llama3, got 'yarn'"),
        (full("llama", rope_scaling={"rope_type": "llama3"}), "config.json lacks factor"),
        (full("llama", rope_scaling={"rope_type": "linear", "factor": "2"}), "factor must be a finite number, got '2'"),
        (full("llama", rope_scaling="linear"), "rope_scaling must be an object or null, got 'linear'"),
        (full("llama", rope_parameters={FULL: {"rope_theta": 5.0}}), "by layer type in a gemma3_text and in no other"),
        (full("qwen3", rope_parameters={SLIDING: {}}), "by layer type in a gemma3_text and in no other"),
        (full("gemma3_text", rope_parameters={"rope_theta": 5.0}), "by layer type in a gemma3_text and in no other"),
        (full("gemma3_text", rope_scaling={FULL: LINEAR}), "by layer type in a gemma3_text and in no other"),
        (full("gemma3_text", rope_parameters={SLIDING: LINEAR}), "rope_type of sliding_attention must be default"),
        (full("llama", rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}), "partial_rotary_factor must be"),
        (full("llama", partial_rotary_factor=0.5), "partial_rotary_factor must be absent or null, got 0.5"),
        (full("llama", rope_theta=0), "rope_theta must be at least 1, got 0.0"),
        (full("gemma3_text", rope_local_base_freq=0.0), "rope_local_base_freq must be at least 1, got 0.0"),
        (full("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping must be absent or null, got 50.0"),
        (full("gemma3_text", final_logit_softcapping=30.0), "final_logit_softcapping must be absent or null, got 30.0"),
        (full("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention must be absent or null"),
        (full("llama", is_causal=False), "is_causal must be absent or null, got False"),
        (full("gemma3_text", query_pre_attn_scalar=0), "query_pre_attn_scalar must be 1 to 2147483647, got 0"),
        (full("gemma3_text", query_pre_attn_scalar=2.5), "query_pre_attn_scalar must be a whole number, got 2.5"),
        (full("gemma3_text", hidden_activation="gelu"), "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'"),
        (full("llama", hidden_act="gelu"), "hidden_act must be 'silu', got 'gelu'"),
        (full("gemma3_text", sliding_window=None), "sliding_window must be set and in use where a layer is sliding"),
        (full("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern must be 1 to 2147483647, got 0"),
        (full("qwen2", layer_types=[SLIDING] * 3), "sliding_window must be set and in use where a layer is sliding"),
        (full("qwen3", layer_types=[FULL] * 2), "layer_types must name each of the 3 layers, got 2"),
        (full("qwen3", layer_types=["chunked_attention"] * 3), "layer_types must list full_attention and sliding"),
        (full("qwen3", layer_types="full"), "layer_types must list full_attention and sliding_attention alone"),
        (full("mistral", layer_types=[FULL] * 3), "layer_types must all be sliding_attention, got"),
        (full("mistral", sliding_window=0), "sliding_window must be 1 to 2147483647, got 0"),
        (full("mistral", sliding_window="4096"), "sliding_window must be a whole number, got '4096'"),
        (full("llama", sliding_window=64), "sliding_window must be null, as no llama slides, got 64"),
        (full("llama", num_key_value_heads=0), "num_key_value_heads must be 1 to 2147483647, got 0"),
        (full("llama", head_dim=0), "head_dim must be 1 to 2147483647, got 0"),
        (full("llama", head_dim=7), "model.head_size must be even (RoPE turns pairs), got 7"),
        (full("llama", vocab_size=0), "vocab_size must be 1 to 2147483647, got 0"),
        (full("llama", num_hidden_layers=10**9), "num_hidden_layers must be 1 to 10000, got 1000000000"),
        (full("llama", hidden_size=None), "config.json lacks hidden_size"),
        (full("llama", hidden_size="wide"), "hidden_size must be a whole number, got 'wide'"),
        (full("llama", hidden_size=True), "hidden_size must be a whole number, got True"),
        (full("llama", rms_norm_eps="abc"), "rms_norm_eps must be a finite number, got 'abc'"),
        (full("llama", rms_norm_eps=float("nan")), "rms_norm_eps must be a finite number, got nan"),
        (full("llama", rms_norm_eps=10**400), "rms_norm_eps must be a finite number, got 1000"),
        (full("llama", tie_word_embeddings="false"), "tie_word_embeddings must be true or false, got 'false'"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused_by_name(config: Json, words: str) -> None:
    with pytest.raises(UserError) as error:
        from_huggingface(config)
    assert words in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([FULL, SLIDING, "factor"]), inner),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_any_value_in_any_field_is_read_or_refused_in_one_sentence(family: str, data: st.DataObject) -> None:
    window = None if family == "llama" else 4
    config = {**to_huggingface(shape(), **IDS), **full(family), "sliding_window": window, "rope_parameters": None}
    fields = [*config, "layer_types", "rope_scaling", "max_window_layers", "query_pre_attn_scalar", "hidden_activation"]
    for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
        config[field] = data.draw(JSON_VALUES)
    try:
        read = from_huggingface(config)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert from_huggingface(json.loads(json.dumps(to_huggingface(read, **IDS)))).family == read.family


def test_a_pattern_is_written_for_readers_that_know_only_from_which_layer_on_all_slide() -> None:
    types = [FULL, SLIDING, SLIDING]
    written = to_huggingface(shape(layers=3, qkv_bias=True, sliding_window=8, layer_types=types), **IDS)
    assert (written["use_sliding_window"], written["max_window_layers"], written["layer_types"]) == (True, 1, types)
    older = {key: value for key, value in written.items() if key != "layer_types"}
    assert from_huggingface(older).layer_types == types
