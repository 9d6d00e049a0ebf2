from __future__ import annotations

from typing import Any

import pytest

from hasten.errors import UserError
from hasten.model.config import Activation, ModelConfig, RopeKind, RopeScaling
from tests.tiny import GEMMA

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"head_size": 20, "qkv_bias": True, "output_bias": True}, "llama"),
        ({"mlp_bias": True}, "llama"),
        ({"sliding_window": 8, "layer_types": [FULL] * 4}, "llama"),
        ({"sliding_window": 8}, "mistral"),
        ({"sliding_window": 8, "layer_types": [SLIDING] * 4}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "head_size": 20}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": 8, "layer_types": [FULL, FULL, SLIDING, SLIDING]}, "qwen2"),
        ({"head_norm": True}, "qwen3"),
        ({"head_norm": True, "qkv_bias": True, "output_bias": True, "sliding_window": 8}, "qwen3"),
        ({"hidden_size": 250, "head_size": 32, "head_norm": True}, "qwen3"),
        (GEMMA, "gemma3_text"),
        ({**GEMMA, "qkv_bias": True, "output_bias": True, "attention_scale": 168**-0.5}, "gemma3_text"),
        ({**GEMMA, "sliding_window": 8, "local_rope_theta": 1e4}, "gemma3_text"),
    ],
)
def test_the_family_is_the_architecture_with_that_combination_of_features(changes: dict[str, Any], family: str) -> None:
    assert ModelConfig(**changes).family == family


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"post_norms": True}, "model.post_norms, offset_norms, embedding_scale, head_norm and activation=gelu_tanh"),
        ({**GEMMA, "mlp_bias": True}, "come together, without mlp_bias"),
        ({**GEMMA, "head_norm": False}, "come together, without mlp_bias"),
        ({"activation": Activation.gelu_tanh}, "no architecture has only some of them"),
        ({"local_rope_theta": 1e4}, "model.local_rope_theta and attention_scale must be 0, only Gemma 3 has them"),
        ({"attention_scale": 0.1}, "model.local_rope_theta and attention_scale must be 0, only Gemma 3 has them"),
        ({"head_norm": True, "mlp_bias": True}, "model.head_norm comes without mlp_bias"),
        ({"head_norm": True, "qkv_bias": True}, "with both attention biases or none (Qwen 3)"),
        ({"qkv_bias": True, "mlp_bias": True}, "model.qkv_bias without output_bias comes without mlp_bias (Qwen 2)"),
        ({"output_bias": True}, "model.output_bias comes with qkv_bias (Llama), got output_bias alone"),
        ({"sliding_window": 8, "mlp_bias": True}, "model.sliding_window comes without biases and in every layer"),
        ({"sliding_window": 8, "layer_types": [SLIDING, FULL] * 2}, "model.sliding_window comes without biases"),
    ],
)
def test_a_combination_that_no_architecture_has_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": [FULL] * 3}, "model.layer_types must name each of the 4 layers or none, got 3"),
        ({"layer_types": ["global"] * 4}, "model.layer_types must be one of ('full_attention', 'sliding_attention')"),
        ({"layer_types": [SLIDING] * 4}, "model.sliding_window must be above 0 where model.layer_types has"),
        ({"sliding_window": -1}, "model.sliding_window must be 0 (none) or more, got -1"),
        ({"rope_theta": 0.5}, "model.rope_theta must be at least 1.0 and finite, got 0.5"),
        ({"rope_theta": float("nan")}, "model.rope_theta must be at least 1.0 and finite, got nan"),
        ({"norm_epsilon": -1e-5}, "model.norm_epsilon must be at least 0.0 and finite, got -1e-05"),
        ({"initializer_range": 2.0}, "model.initializer_range must be 0 to 1, got 2.0"),
        ({**GEMMA, "attention_scale": 0.3}, "model.attention_scale must be 0 or 1 / sqrt of a whole number"),
        ({**GEMMA, "attention_scale": 1e-200}, "model.attention_scale must be 0 or 1 / sqrt of a whole number"),
        ({**GEMMA, "attention_scale": 1.5}, "model.attention_scale must be 0 or 1 / sqrt of a whole number"),
        ({**GEMMA, "attention_scale": -0.5}, "model.attention_scale must be 0 (the usual) or above 0, got -0.5"),
        ({**GEMMA, "local_rope_theta": 0.5}, "model.local_rope_theta must be 0 (the usual) or above 1, got 0.5"),
        ({**GEMMA, "hidden_size": 250, "head_size": 32}, "model.heads must divide model.hidden_size (250), got 8"),
        (
            {**GEMMA, "sliding_window": 8, "rope_scaling": RopeScaling(RopeKind.linear, 2.0)},
            "model.local_rope_theta must be above 0 beside rope_scaling",
        ),
    ],
)
def test_a_value_that_means_nothing_is_refused_with_what_was_given(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        ModelConfig(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"factor": 0.5}, "model.rope_scaling.factor must be at least 1, got 0.5"),
        ({"kind": RopeKind.linear, "factor": float("nan")}, "model.rope_scaling.factor must be at least 1, got nan"),
        ({"factor": 2.0}, "model.rope_scaling.factor must be 1 where kind is default, got 2.0"),
        (
            {"kind": RopeKind.llama3, "low_frequency_factor": 4.0},
            "model.rope_scaling.low_frequency_factor must lie between 0 and high_frequency_factor (4.0), got 4.0",
        ),
        (
            {"kind": RopeKind.llama3, "high_frequency_factor": float("inf")},
            "must lie between 0 and high_frequency_factor (inf), got 1.0",
        ),
        ({"original_context": 0}, "model.rope_scaling.original_context must be at least 1, got 0"),
    ],
)
def test_a_stretch_that_means_nothing_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        RopeScaling(**fields)
    assert words in str(error.value)


def test_a_window_bounds_what_sliding_layers_attend_to_and_no_other() -> None:
    mixed = ModelConfig(head_norm=True, sliding_window=8, layer_types=[SLIDING, FULL, SLIDING, FULL])
    assert [mixed.slides(layer) for layer in range(4)] == [True, False, True, False]
    assert [mixed.attended(layer, 20) for layer in range(2)] == [8, 20]
    assert [mixed.attended(layer, 5) for layer in range(2)] == [5, 5]
    assert mixed.sliding_layers == 2
    assert ModelConfig(sliding_window=8).sliding_layers == 4  # no layer_types: all of them
    assert ModelConfig().sliding_layers == 0


def test_scores_are_scaled_by_the_heads_width_unless_told_otherwise() -> None:
    assert ModelConfig(head_size=16).score_scale == 0.25
    assert ModelConfig(**GEMMA, head_size=16, attention_scale=0.5).score_scale == 0.5
