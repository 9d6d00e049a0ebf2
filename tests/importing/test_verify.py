from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.errors import UserError
from hasten.importing.verify import TOLERANCE, logit_difference
from hasten.model.config import RopeKind, RopeScaling
from hasten.model.imported import Huggingface
from tests.importing.arrivals import FULL, GEMMA, SHAPES, SLIDING, bring, change_json, leftovers, write_source
from tests.tiny import shape

LLAMA3 = RopeScaling(RopeKind.llama3, factor=8.0, original_context=16)


@pytest.mark.parametrize("name", SHAPES)
def test_our_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path / "source", shape(**SHAPES[name]))
    assert logit_difference(source, bring(source), tokens=24) < 1e-5


def test_stretched_positions_are_those_of_transformers(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shape(rope_scaling=LLAMA3, head_size=16))
    assert logit_difference(source, bring(source), tokens=60) < 1e-5


def test_no_more_tokens_are_compared_than_the_context_holds(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shape(context=8))
    assert logit_difference(source, bring(source), tokens=1000) < 1e-5


def test_another_formula_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    imported = bring(source)
    change_json(source / "config.json", rms_norm_eps=0.5)
    with pytest.raises(UserError, match=rf"differ from those of transformers by .* more than {TOLERANCE}"):
        logit_difference(source, imported, tokens=32)


LONG = {"context": 131072, "head_size": 16, "rope_theta": 500000.0}
STRETCHED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WIDE = {"sliding_window": 100, "context": 4096}
# what only long texts show: a shape, what its config.json is changed to say, the sentence
SLOW: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a factor": (
        {**LONG, "rope_scaling": RopeScaling(RopeKind.llama3, factor=8.0, original_context=8192)},
        {"rope_scaling": {**STRETCHED, "factor": 32.0, "original_max_position_embeddings": 8192}},
        "turns the pairs of its heads by other angles",
    ),
    "an original context": (
        {**LONG, "rope_scaling": RopeScaling(RopeKind.llama3, factor=8.0, original_context=8192)},
        {"rope_scaling": {**STRETCHED, "factor": 8.0, "original_max_position_embeddings": 4096}},
        "turns the pairs of its heads by other angles",
    ),
    "the base of sliding layers": (
        {**GEMMA, "context": 4096},
        {"rope_local_base_freq": 101.0},
        r"layer 0 attends .* turns the pairs of its heads by other angles",
    ),
    "a window": (WIDE, {"sliding_window": 108}, "sees 100 tokens here .*, 108 there"),
    "no window": (WIDE, {"sliding_window": None}, r"sees 100 tokens here \(0: all\), 0 there"),
    "which layers slide": (
        {**GEMMA, **WIDE},
        {"layer_types": [FULL, SLIDING]},
        r"layer 0 .* sees 100 tokens here \(0: all\), 0 there",
    ),
    "a scale": ({**GEMMA, "context": 4096}, {"query_pre_attn_scalar": 17}, "multiplies scores by 0.25 here, 0.242536"),
}


@pytest.mark.parametrize("case", SLOW)
def test_what_only_long_texts_show_is_compared_layer_by_layer(tmp_path: Path, case: str) -> None:
    fields, changes, words = SLOW[case]
    source = write_source(tmp_path / "source", shape(**fields))
    imported = bring(source)
    assert logit_difference(source, imported, tokens=4) < 1e-5
    change_json(source / "config.json", **changes)
    with pytest.raises(UserError, match=words):
        logit_difference(source, imported, tokens=4)


def test_the_text_is_longer_than_a_window_of_usual_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", shape(**WIDE))
    imported = bring(source)
    change_json(source / "config.json", sliding_window=108)
    monkeypatch.setattr("hasten.importing.verify._check_layers", lambda ours, theirs: None)
    with pytest.raises(UserError, match="its logits differ from those of transformers"):
        logit_difference(source, imported, tokens=32)


def test_config_does_not_choose_the_code_that_runs(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", attn_implementation="kernels-community/flash-attn")
    assert logit_difference(source, bring(source), tokens=4) < 1e-5


def test_what_transformers_cannot_open_is_one_sentence(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 1}')
    change_json(source / "config.json", rope_parameters={"rope_type": "default", "rope_theta": "long"})
    imported = bring(write_source(tmp_path / "sound"))
    with pytest.raises(UserError, match="transformers cannot open it, so nothing can be compared"):
        logit_difference(source, imported, tokens=4)


def test_a_refused_comparison_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    base = bring(source)
    before = (base / "manifest.json").read_bytes()
    monkeypatch.setattr("hasten.importing.verify.TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"model\.verify_tokens=0 imports it all the same"):
        bring(source, Huggingface(verify_tokens=4))
    assert (base / "manifest.json").read_bytes() == before
    assert leftovers(tmp_path) == []
