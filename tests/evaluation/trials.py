"""A job for a trial with the fake engine, and what tests of processes need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hasten.evaluation import process
from hasten.evaluation.trial import Job
from hasten.scenario.qa import Qa
from hasten.task.base import Item
from hasten.task.data import write_task
from hasten.task.jsonl import Jsonl
from hasten.tokenizer.base import load_tokenizer, write_tokenizer
from tests.fakes import VOCABULARY, FakeEngine, write_tokens, write_variant

QA = Qa(prompt_tokens=16, output_tokens=4, requests=6, warmup=1, minimum_requests=5, patience_seconds=0)


def write_job(folder: Path) -> Job:
    return Job(
        trial="int8@fake",
        variant=write_variant(folder / "int8"),
        engine=FakeEngine(threads=2),
        tasks=folder / "tasks",
        tokens=write_tokens(folder / "tokens", list(range(3, 49))),
        tokenizer=folder / "tokenizer",
        cache=folder / "cache",
        scenarios={"qa": QA},
    )


def with_mode(job: Job, mode: str) -> Job:
    job.cache.mkdir(exist_ok=True)
    return replace(job, engine=FakeEngine(mode=mode))


def write_quiz(job: Job) -> None:
    """A task of two questions, of which the fake engine (`count_up`) answers the first right."""
    import tokenizers

    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<bos>", "<eos>"])
    job.tokenizer.mkdir()
    write_tokenizer(job.tokenizer, backend, {"bos": "<bos>", "eos": "<eos>"}, {}, {})
    right, wrong = Item("1", "1", "en", "w5 w6", "w9"), Item("2", "2", "zh", "w7", "w3")
    items = {"train": [right], "validation": [right, wrong], "test": [right]}
    folder = job.tasks / "quiz"
    folder.mkdir(parents=True)
    write_task(folder, Jsonl(), items, load_tokenizer(job.tokenizer))


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@contextmanager
def time_is_up_when(condition: Callable[[], object]) -> Iterator[None]:
    """The time of whatever is waited for is up when it has come that far, however long that takes."""
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + (1e6 if condition() else 0.0), sleep=time.sleep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "time", clock)
        yield


def at_it(doing: str) -> bool:
    """Whether a child said that it does that."""
    return any(child.doing == doing for child in process.LIVING.values())


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
