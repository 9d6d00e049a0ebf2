from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from hasten.tokenizer.base import load_tokenizer, write_tokenizer
from hasten.tokenizer.translating import Translation, own_tokenizer, translation
from tests.engine import llama


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Translation:
    """From a byte-level tokenizer to one of bytes alone, whose control tokens have other places and one less."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "plan").mkdir()
    llama.write_tokenizer(folder / "plan")
    (folder / "own").mkdir()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<s>"])
    write_tokenizer(folder / "own", backend, {"bos": "<s>", "eos": "</s>", "pad": None}, {}, {})
    found = translation(folder / "plan", folder / "own")
    assert found is not None
    return found


@given(text=st.text(max_size=30))
@example("\ufffd at both ends \ufffd")
def test_what_is_translated_spells_the_same_text(both: Translation, text: str) -> None:
    ids = both.source.encode(text)
    there = both(ids)
    assert there == both.target.encode(text)
    assert both.back(there) == ids


def test_control_tokens_go_by_their_part_and_one_without_a_counterpart_is_left_out(both: Translation) -> None:
    source, target = both.source, both.target
    text = source.encode("fox")
    found = both([source.bos_id, *text, source.eos_id, source.pad_id or 0, *text])
    expected = target.encode("fox")
    assert (source.bos_id, source.eos_id) != (target.bos_id, target.eos_id)
    assert found == [target.bos_id, *expected, target.eos_id, *expected]


def test_half_a_character_at_a_cut_is_left_out(both: Translation) -> None:
    ids = Translation(both.source, both.target).target.encode("天x气")  # three bytes each
    back = both.back
    assert both.source.decode(back(ids[1:-1], cut=True)) == "x"
    assert both.source.decode(back(ids[1:-1])) != "x"
    assert back(ids[:1], cut=True) == []


def test_there_is_none_between_copies_and_for_a_checkpoint_without_a_tokenizer(
    both: Translation, tmp_path: Path
) -> None:
    plan = tmp_path / "plan"
    plan.mkdir()
    llama.write_tokenizer(plan)
    shutil.copytree(plan, tmp_path / "copy")
    (tmp_path / "bare").mkdir()
    assert translation(plan, tmp_path / "copy") is None
    assert translation(plan, tmp_path / "bare") is None
    assert own_tokenizer(plan, tmp_path / "bare").vocab_size == load_tokenizer(plan).vocab_size
