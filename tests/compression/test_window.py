from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.window import Window
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_checkpoint, write_variant

SLIDES = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, tuple[ModelConfig, dict[str, int], str]] = {
    "llama": (shape(), {}, "mistral"),
    "mistral": (shape(sliding_window=16), {}, "mistral"),
    "qwen2": (shape(qkv_bias=True), {"full_every": 2}, "qwen2"),
    "qwen3": (shape(head_norm=True), {}, "qwen3"),
    "gemma": (shape(local_rope_theta=500.0, **SLIDES, **GEMMA), {}, "gemma3_text"),
}
TEXT = text(4, 20)


def windowed(tmp_path: Path, model: Decoder, **options: int) -> Variant:
    parent = write_variant(tmp_path / "baseline", model)
    method = Window(**{"window": 8, **options})
    return make_variant(method, parent, None, name="near", target=tmp_path / "near", seed=0)[0]


@pytest.mark.parametrize("case", CASES)
def test_text_within_the_window_is_computed_as_before_and_longer_text_is_not(tmp_path: Path, case: str) -> None:
    config, options, family = CASES[case]
    model = decoder(config)
    variant = windowed(tmp_path, model, **options)
    assert variant.config["model_type"] == family
    near = load_network(variant).eval()
    assert near.config.sliding_window == 8
    with torch.inference_mode():
        assert torch.equal(near(TEXT.ids[:, :8]), model(TEXT.ids[:, :8]))
        assert not torch.allclose(near(TEXT.ids), model(TEXT.ids), atol=1e-3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in variant.tensors().items())


@pytest.mark.parametrize("case", CASES)
def test_it_runs_opens_in_transformers_and_can_be_quantised(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    config, options, _ = CASES[case]
    variant = windowed(tmp_path, decoder(config), **options)
    child, _ = make_variant(Rtn(), variant, None, name="int8", target=tmp_path / "int8", seed=0)
    for one in (variant, child):
        assert len(list(Eager(threads=1).load(one, tmp_path).submit(Request(0, (5, 6), 12)))) == 12
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(variant.path).eval()(TEXT.ids).logits
        torch.testing.assert_close(load_network(variant).eval()(TEXT.ids), theirs, rtol=1e-3, atol=1e-3)


def test_every_so_manieth_layer_stays_full(tmp_path: Path) -> None:
    variant = windowed(tmp_path, decoder(shape(layers=5, head_norm=True)), full_every=2)
    assert [kind[0] for kind in variant.config["layer_types"]] == ["s", "f", "s", "f", "s"]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (shape(), {"window": 64}, r"compression\.window must be below .* attend to \(64\), got 64"),
        (shape(sliding_window=8), {"window": 8}, r"compression\.window must be below .* attend to \(8\), got 8"),
        (shape(), {"full_every": 2}, "window would make a shape that no family has: .* in every layer"),
        (shape(**GEMMA), {}, "window needs a Gemma 3 that has sliding layers, got one without"),
        (shape(**SLIDES, **GEMMA), {"full_every": 2}, r"compression\.full_every must be 0 for a Gemma 3"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, config: ModelConfig, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        windowed(tmp_path, decoder(config), **options)


def test_options_and_parents_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compression\.window must be at least 1, got 0"):
        Window(0)
    with pytest.raises(UserError, match=r"compression\.full_every must be 0 \(none\) or at least 2, got 1"):
        Window(full_every=1)
    quantised, _ = make_variant(Rtn(), write_variant(tmp_path / "b"), None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match="window needs a float parent"):
        Window().compress(quantised, None, 0)
    with pytest.raises(UserError, match="window is for decoders"):
        Window().compress(write_checkpoint(tmp_path / "lstm", lstm()), None, 0)
