from pathlib import Path

import pytest

from hasten.artifacts import digest
from hasten.errors import UserError
from hasten.task.base import SPLITS, Item
from hasten.task.data import TaskData, rebuild, write_task
from hasten.task.jsonl import Jsonl
from hasten.task.reply_choice import ReplyChoice
from hasten.tokenizer.base import Tokenizer, TrainingText, load_tokenizer
from hasten.tokenizer.bpe import Bpe


def item(split: str, number: int) -> Item:
    return Item(
        f"{split}{number}", f"c{number}", "zh" if number else "en", f"{split} 提示 {number}", f" answer{number}"
    )


ITEMS = {split: [item(split, number) for number in range(3)] for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    Bpe(vocabulary=260).build(TrainingText({"en": 6}, lambda: iter([("en", "answer")])), folder)
    return load_tokenizer(folder)


@pytest.fixture
def data(tmp_path: Path, tokenizer: Tokenizer) -> TaskData:
    folder = tmp_path / "own"
    folder.mkdir()
    write_task(folder, Jsonl(path="own.jsonl", language="fr"), ITEMS, tokenizer)
    return TaskData(folder)


def test_items_come_back_as_written(data: TaskData) -> None:
    assert {split: data.items(split) for split in SPLITS} == ITEMS


def test_the_manifest_says_what_a_stage_needs(data: TaskData, tokenizer: Tokenizer) -> None:
    manifest = data.manifest
    assert (manifest["task"], manifest["language"]) == ("jsonl", "mul")
    assert manifest["n"] == {"train": 3, "validation": 3, "test": 3}
    assert manifest["classes"] == [" answer0", " answer1", " answer2"]
    assert manifest["max_output_tokens"] == len(tokenizer.encode(" answer0")) + 1
    assert manifest["longest_prompt_tokens"] == 1 + len(tokenizer.encode("validation 提示 0"))
    assert set(manifest["baselines"]) == {"majority", "tfidf"}


def test_the_task_is_rebuilt_with_its_options(data: TaskData) -> None:
    assert data.task == Jsonl(path="own.jsonl", language="fr")
    assert rebuild("reply_choice", {"context_turns": 3}) == ReplyChoice(context_turns=3)


def test_the_same_items_give_the_same_bytes(data: TaskData, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "again").mkdir()
    write_task(tmp_path / "again", data.task, ITEMS, tokenizer)
    assert digest(tmp_path / "again") == data.hash


def test_what_cannot_be_read_is_named(data: TaskData) -> None:
    (data.path / "test.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"test\.parquet is not a readable task split"):
        data.items("test")
    with pytest.raises(UserError, match="split must be one of"):
        data.items("dev")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("absent", {}, "cannot be rebuilt"),
        ("jsonl", {"colour": "red"}, "cannot be rebuilt"),
        ("splitting", {}, "cannot be rebuilt"),
        ("jsonl", {"train_items": -1}, "train_items must be 0"),
    ],
)
def test_a_task_that_cannot_be_rebuilt_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rebuild(name, options)
