from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hasten.artifacts import Json, Tokens, digest
from hasten.corpus.base import Document, Source
from hasten.corpus.chitchat import Chitchat
from hasten.corpus.prepare import prepare
from hasten.errors import UserError
from hasten.task.data import TaskData
from hasten.task.jsonl import Jsonl
from hasten.task.reply_choice import ReplyChoice
from hasten.tokenizer.base import load_tokenizer
from hasten.tokenizer.bpe import Bpe
from tests.archives import chitchat, install

QUESTION = "which of the ten planets is the largest of them all"


@dataclass
class Letters(Source):
    """A few documents, of which one quotes the task's test item."""

    extra: list[str] = field(default_factory=list)

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate([f"第{n}封信：你好，世界。" * 5 for n in range(80)] + self.extra):
            yield Document(f"letters/{number}", "zh", text)


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"chitchat_dataset/dataset.json": chitchat(120)})


@pytest.fixture
def task(tmp_path: Path) -> Jsonl:
    splits = ["train"] * 4 + ["validation"] * 2 + ["test"]
    prompts = [f"question {n}: is {n} even?" for n in range(6)] + [f"{QUESTION}?"]
    lines = [
        f'{{"prompt": "{prompt}", "completion": " {"no" if n % 2 else "yes"}", "split": "{split}"}}'
        for n, (prompt, split) in enumerate(zip(prompts, splits, strict=True))
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    return Jsonl(path=str(tmp_path / "own.jsonl"))


def run(folder: Path, task: Jsonl, workers: int = 1, extra: str = "") -> Json:
    sources: dict[str, Source] = {"chitchat": Chitchat(), "letters": Letters(extra=[extra] if extra else [])}
    tasks = {"own": task, "reply_choice": ReplyChoice()}
    return prepare(sources, tasks, Bpe(vocabulary=400), folder, validation_fraction=0.2, workers=workers)


def test_tokens_tasks_and_tokenizer_are_written_and_described(tmp_path: Path, task: Jsonl) -> None:
    facts = run(tmp_path / "plan", task, extra=f"He asked: {QUESTION.upper()}, I wonder.")
    tokens = Tokens(tmp_path / "plan" / "tokens")
    loaded = load_tokenizer(tmp_path / "plan" / "tokenizer")
    data = TaskData(tmp_path / "plan" / "tasks" / "reply_choice")
    held_out = data.manifest["n"]["validation"] + data.manifest["n"]["test"]
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["tasks", "tokenizer", "tokens"]
    assert tokens.manifest["languages"] == ["en", "zh"]
    assert [group.name for group in tokens.groups("train")] == ["chitchat/en", "letters/zh"]
    assert tokens.manifest["sha256"]["train.bin"] == digest(tokens.path / "train.bin")
    assert tokens.manifest["contamination"] == facts["contamination"]
    assert facts["contamination"]["remaining"] == 0
    assert facts["contamination"]["dropped_documents"] == facts["sources"]["letters"]["contaminated"] == 1
    assert facts["contamination"]["held_out_documents"] == facts["sources"]["chitchat"]["held_out"] == held_out > 10
    text = loaded.decode(tokens.ids("train").tolist() + tokens.ids("validation").tolist())
    assert QUESTION not in text.lower()
    for item in data.items("test"):
        # A reply's own words; its number names the conversation.
        assert not any(option in text for option in ReplyChoice().choices(item)[1].values())


def test_the_same_work_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path, task: Jsonl) -> None:
    run(tmp_path / "one", task, workers=1)
    run(tmp_path / "two", task, workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_what_a_killed_run_left_is_removed_and_replaced(tmp_path: Path, task: Jsonl) -> None:
    plan = tmp_path / "plan"
    for leftover in (".spool", ".tokens.0badc0de", "tokens"):
        (plan / leftover).mkdir(parents=True)
        (plan / leftover / "half").write_text("written")
    run(plan, task)
    assert sorted(path.name for path in plan.iterdir()) == ["tasks", "tokenizer", "tokens"]
    assert not (plan / "tokens" / "half").exists()


def test_a_passage_that_slips_through_stops_the_stage(
    tmp_path: Path, task: Jsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.corpus.decontaminate.Screen.hits", lambda self, text: False)
    with pytest.raises(RuntimeError, match="1 passages of task items are left"):
        run(tmp_path / "plan", task, extra=QUESTION)
    assert not (tmp_path / "plan" / "tokens").exists()


def test_an_empty_corpus_is_refused(tmp_path: Path, task: Jsonl) -> None:
    with pytest.raises(UserError, match="the corpus is empty"):
        prepare({}, {"own": task}, Bpe(), tmp_path / "plan")


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no validation document"):
        prepare({"letters": Letters(limit_documents=0)}, {}, Bpe(), tmp_path / "plan", validation_fraction=1e-9)


def test_a_task_without_test_items_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "split": "validation"}')
    with pytest.raises(UserError, match="task own has no items in its test split"):
        prepare({"letters": Letters()}, {"own": Jsonl(path=str(path))}, Bpe(), tmp_path / "plan")


@pytest.mark.parametrize(("option", "value"), [("validation_fraction", 1.0), ("workers", -1)])
def test_options_out_of_range_are_refused(tmp_path: Path, option: str, value: float) -> None:
    with pytest.raises(UserError, match=option):
        prepare({"letters": Letters()}, {}, Bpe(), tmp_path / "plan", **{option: value})  # type: ignore[arg-type]
