from __future__ import annotations

from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.importing.verify import TOLERANCE, logit_difference
from hasten.model.config import RopeKind, RopeScaling
from hasten.model.imported import Huggingface
from tests.importing.arrivals import SHAPES, bring, change_json, leftovers, write_source
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
    change_json(source / "config.json", rope_theta=50.0)
    with pytest.raises(UserError, match=rf"differ from those of transformers by .* more than {TOLERANCE}"):
        logit_difference(source, imported, tokens=32)


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
    with pytest.raises(UserError, match=r"model\.verify_tokens=0 would import it all the same"):
        bring(source, Huggingface(verify_tokens=4))
    assert (base / "manifest.json").read_bytes() == before
    assert leftovers(tmp_path) == []
