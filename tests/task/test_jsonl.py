import json
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import UserError
from hasten.task.base import SPLITS
from hasten.task.jsonl import Jsonl


def write(tmp_path: Path, rows: list[Any]) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def row(prompt: str = "one plus one?", completion: str = " two", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def test_declared_splits_are_kept(tmp_path: Path) -> None:
    rows = [row(f"{split} {n}", split=split) for n in range(3) for split in SPLITS]
    task = Jsonl(path=write(tmp_path, rows), test_items=2)
    assert [item.prompt for item in task.items("validation")] == ["validation 0", "validation 1", "validation 2"]
    assert [item.prompt for item in task.items("test")] == ["test 0", "test 1"]


def test_without_splits_items_are_split_by_cluster(tmp_path: Path) -> None:
    rows = [row(f"question {n}", cluster=f"c{n // 3}") for n in range(90)]
    task = Jsonl(path=write(tmp_path, rows), validation_items=0, test_items=0)
    clusters = [{item.cluster for item in task.items(split)} for split in SPLITS]
    assert all(clusters)
    assert sum(map(len, clusters)) == len(set().union(*clusters)) == 30


def test_the_same_prompt_never_is_in_two_splits(tmp_path: Path) -> None:
    rows = [row(f"Question {n}" + "!" * copy) for n in range(30) for copy in range(3)]
    task = Jsonl(path=write(tmp_path, rows), validation_items=0, test_items=0)
    prompts = [{item.prompt.rstrip("!") for item in task.items(split)} for split in SPLITS]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 30


def test_optional_fields_have_defaults(tmp_path: Path) -> None:
    rows = [row(split="test"), row("二加二？", "四", id="b", cluster="k", language="zh", split="test")]
    first, second = Jsonl(path=write(tmp_path, rows), language="fr").items("test")
    assert (first.id, first.language, first.expected) == ("1", "fr", " two")
    assert (second.id, second.cluster, second.language) == ("b", "k", "zh")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"own\.jsonl:1: a line must be an object"),
        ([[1, 2]], r"own\.jsonl:1: a line must be an object"),
        ([row(), {"prompt": "x"}], r"own\.jsonl:2: .*'completion'"),
        ([row(completion=" ")], "completion must be a text that is not empty"),
        ([row(prompt=3)], "prompt must be a text"),
        ([row(split="dev")], r"split must be one of .*'dev'"),
        ([row(id="a"), row("other", id="a")], "id must be unique, got 'a' again"),
        ([row(cluster="c", split="train"), row("other", cluster="c", split="test")], "'c' is in two splits"),
        ([row(split="train"), row("other")], "either every line or no line must have a split"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(Jsonl(path=write(tmp_path, rows)).items("test"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must name a"):
        list(Jsonl().items("test"))
    with pytest.raises(UserError, match=r"cannot read .*absent\.jsonl"):
        list(Jsonl(path=str(tmp_path / "absent.jsonl")).items("test"))
    with pytest.raises(UserError, match="split must be one of"):
        list(Jsonl().items("dev"))
