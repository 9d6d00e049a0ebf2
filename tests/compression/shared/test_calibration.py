from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Tokens
from hasten.compression.depth import Depth
from hasten.compression.rtn import Rtn
from hasten.compression.shared.calibration import Calibrate, draw
from hasten.errors import UserError
from hasten.task.base import Item
from hasten.task.data import write_task
from hasten.task.jsonl import Jsonl
from hasten.tokenizer.base import load_tokenizer
from tests.tiny import write_checkpoint, write_tokenizer, write_tokens


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Tokens that count, and two tasks in a language each: `w5 w6` is answered with `w7`."""
    write_tokens(tmp_path / "tokens")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    for name, language, answer in (("rise", "en", "w7"), ("fall", "zh", "w4")):
        found = [Item(f"{n}", f"{n}", language, f"w5 w{10 + n}", f" {answer}") for n in range(12)]
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        write_task(folder, Jsonl(path="unused"), dict.fromkeys(("train", "validation", "test"), found), tokenizer)
    return tmp_path


def test_text_is_drawn_by_seed_from_the_training_split_only(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    (tokens.path / "validation.bin").unlink()  # must not be needed
    first, again, other = (draw(tmp_path, Calibrate(5, 9), seed).ids for seed in (1, 1, 2))
    assert first.shape == (5, 9)
    assert first.dtype is torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stream = tokens.ids("train").tolist()
    rows = {tuple(stream[start : start + 9]) for start in range(len(stream) - 8)}
    assert all(tuple(row) in rows for row in first.tolist())


def test_documents_are_told_apart_and_their_first_tokens_do_not_count(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")  # documents of 20 tokens
    found = draw(tmp_path, Calibrate(4, 50), 0)
    changes = found.documents.diff(dim=1) == 1
    assert (changes.sum(1) >= 2).all()
    assert not found.weights[:, 1:][changes].any()
    assert found.weights.sum() == 4 * 49 - changes.sum()
    assert found.tokens == 200


def test_a_mixture_leaves_a_language_out(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", train=4000)
    offset = Tokens(tokens.path).groups("train")[1].start_token
    english = draw(tmp_path, Calibrate(50, 8, mixture={"zh": 0}), 0)
    stream = tokens.ids("train")
    rows = {tuple(stream[start : start + 8].tolist()) for start in range(offset - 7)}
    assert all(tuple(row) in rows for row in english.ids.tolist())
    assert english.hash != draw(tmp_path, Calibrate(50, 8), 0).hash


def test_items_are_packed_padded_and_only_their_completions_count(plan: Path) -> None:
    found = draw(plan, Calibrate(6, 13, tasks=0.5), 0)
    assert found.source == "3 x 13 tokens of text and 3 x 13 tokens of task items, of the training split"
    text, tasks = found.documents[:3], found.documents[3:]
    assert (text >= 0).all()
    for row, ids, weights in zip(tasks.tolist(), found.ids[3:].tolist(), found.weights[3:].tolist(), strict=True):
        assert row == [0] * 5 + [1] * 5 + [-1] * 3  # [bos] w5 wN w7 [eos]
        assert ids[3] in (7, 4)
        assert ids[4] == 1
        assert weights == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    assert found.tokens == 3 * 13 + 3 * 10


def test_a_mixture_concerns_text_and_tasks_alike(plan: Path) -> None:
    found = draw(plan, Calibrate(8, 10, tasks=1.0, mixture={"zh": 0, "counting": 2}), 0)
    assert {row[3] for row in found.ids.tolist()} == {7}
    with pytest.raises(UserError, match=r"calibration\.mixture must name groups that there are \(.*rise.*\), got 'fr'"):
        draw(plan, Calibrate(8, 10, tasks=1.0, mixture={"fr": 1}), 0)


def test_rows_that_nothing_fills_are_refused_in_the_configs_words(plan: Path) -> None:
    with pytest.raises(UserError, match=r"^calibration\.length must fit .*, got 5000 for"):
        draw(plan, Calibrate(2, 5000), 0)
    with pytest.raises(UserError, match=r"calibration\.length must fit every item, got 4 for an item of task .* 5 tok"):
        draw(plan, Calibrate(2, 4, tasks=1.0), 0)
    with pytest.raises(UserError, match=r"^calibration\.mixture must leave at least one group above 0"):
        draw(plan, Calibrate(2, 8, mixture={"en": 0, "zh": 0}), 0)


def test_text_is_only_drawn_for_methods_that_need_it(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent")
    assert Calibrate().rows_for(Rtn(), tmp_path / "no such folder", parent, 0) is None
    write_tokens(tmp_path / "tokens")
    text = Calibrate(3, 4).rows_for(Depth(), tmp_path, parent, 0)
    assert text is not None
    assert text.ids.shape == (3, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequences": 0}, "calibration.sequences must be at least 1, got 0"),
        ({"length": 1}, "calibration.length must be at least 2, got 1"),
        ({"tasks": 1.5}, "calibration.tasks must be 0 to 1, got 1.5"),
    ],
)
def test_calibration_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Calibrate(**options)
