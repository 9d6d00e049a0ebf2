from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Json, read_json
from hasten.tracking import Run, mirror, track
from hasten.tracking.mirror import Mirror
from hasten.tracking.run import alone

RECORD = Path("artifacts/p/runs/work.json")


@dataclass
class Config:
    plan: str = "p"


class RefusedError(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


class Store:
    """A client of a store in memory, which knows a point by its name, step, time and value as a database does.

    trouble: what happens to the next calls, one each: "fails", "late" (it fails after it has taken everything),
    "refused", "" for nothing. answers: while it is not set, every call hangs.
    """

    def __init__(self, *trouble: str) -> None:
        self.trouble = iter(trouble)
        self.answers = threading.Event()
        self.answers.set()
        self.calls = 0
        self.runs: list[Any] = []
        self.points: dict[tuple[str, int, int, float], None] = {}
        self.arrived: list[str] = []  # names, in the order in which they came first
        self.tags: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.status = ""
        self.histories: list[str] = []  # asked for

    def search_runs(self, *arguments: Any, **options: Any) -> list[Any]:
        return self.runs

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.runs = [SimpleNamespace(info=SimpleNamespace(run_id="r"), data=SimpleNamespace(tags={}, params={}))]
        return self.runs[0]

    def update_run(self, run_id: str, **facts: Any) -> None:
        pass

    def take(self, action: Callable[[], Any]) -> None:
        self.calls += 1
        self.answers.wait(60)
        trouble = next(self.trouble, "")
        if trouble == "refused":
            raise RefusedError("not such a name")
        if trouble != "fails":
            action()
        if trouble:
            raise ConnectionError("nobody is there\nat port 1")

    def log_batch(self, run_id: str, metrics: Any = (), tags: Any = (), params: Any = ()) -> None:
        def action() -> None:
            for each in metrics:
                self.points.setdefault((each.key, each.step, each.timestamp, each.value))
                self.arrive(f"{each.key} {each.step}")
            for tag in tags:
                self.tags[tag.key] = tag.value
                self.arrive(tag.key)

        self.take(action)

    def arrive(self, name: str) -> None:
        if name not in self.arrived:
            self.arrived.append(name)

    def log_text(self, run_id: str, content: str, name: str) -> None:
        def action() -> None:
            self.texts[name] = content
            self.arrive(name)

        self.take(action)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.take(lambda: setattr(self, "status", status))

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        found: list[Any] = []
        self.histories.append(name)
        self.take(lambda: found.extend(SimpleNamespace(step=step) for key, step, *_ in self.points if key == name))
        return found

    def curve(self, name: str) -> list[tuple[int, float]]:
        return [(step, value) for key, step, _, value in self.points if key == name]


def opened(store: Store) -> Mirror:
    """A mirror in that store; what troubles it begins afterwards."""
    trouble, store.trouble = store.trouble, iter(())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "connect", lambda: (store, "0"))
        made = Mirror(record())
    store.trouble, store.calls, store.arrived = trouble, 0, []
    return made


def record() -> Json:
    empty: Json = {name: {} for name in ("tags", "params", "metrics", "curves", "texts")}
    return {"key": "k", "name": "work", "artifacts": [], **empty}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """What `track` connects to; the working directory is the test's own."""
    made = Store()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mirror, "connect", lambda: (made, "0"))
    return made


def quick(patch: pytest.MonkeyPatch, seconds: float = 0.001) -> None:
    for name in ("SEND_SECONDS", "RETRY_SECONDS", "LONGEST_RETRY_SECONDS"):
        patch.setattr(mirror, name, seconds)


@settings(max_examples=60)
@given(
    said=st.lists(st.sampled_from(["point", "text", "tag"]), max_size=15),
    trouble=st.lists(st.sampled_from(["", "fails", "late"]), max_size=15),
)
def test_whatever_goes_wrong_in_between_everything_arrives_once_and_in_order(
    said: list[str], trouble: list[str]
) -> None:
    store = Store(*trouble)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        run = Run(record(), opened(store))
        names = []
        for number, kind in enumerate(said, 1):
            if kind == "point":
                run.metrics({"loss": number / 2}, number)
            elif kind == "text":
                run.text(f"{number}.md", str(number))
            else:
                run.tags({f"tag{number}": number})
            names.append({"point": f"loss {number}", "text": f"{number}.md", "tag": f"tag{number}"}[kind])
        assert run.mirror is not None
        while not run.mirror.flush(5):
            pass  # the next attempt comes by itself
        store.trouble = iter(())
        run.finish("FINISHED")
    assert store.arrived == names
    assert store.curve("loss") == [(n, n / 2) for n, kind in enumerate(said, 1) if kind == "point"]
    assert store.status == "FINISHED"


def test_a_store_that_is_gone_is_asked_less_and_less_often_and_the_user_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    made = opened(Store())
    gone, waits = ConnectionError("connection refused\nby 127.0.0.1"), []
    for error in [*[gone] * 8, None, gone, None, None]:
        made._note(error)
        waits.append(made._next - 1000)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 10, 5, 10, 10]
    went = "MLflow does not answer (connection refused); figures are kept and sent later"
    back = "MLflow answers again; what was kept has been sent"
    assert capsys.readouterr().err.splitlines() == [went, back, went, back]


def test_a_store_that_hangs_holds_up_neither_the_work_nor_its_end_for_long(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "GRACE_SECONDS", {"FINISHED": 0.2})
    began = time.perf_counter()
    try:
        with track("work", Config(), inputs={}, record=RECORD) as run:
            run.send()
            store.answers.clear()
            for step in range(1, 201):
                run.metrics({"loss": 1 / step, "rate": 0.1}, step)
            run.text("samples/a.md", "a")
            worked = time.perf_counter() - began
        ended = time.perf_counter() - began - worked
    finally:
        store.answers.set()
    assert worked < 5  # not one minute, for which the store hangs, nor one for each figure
    assert 0.2 <= ended < 5
    assert capsys.readouterr().err == "MLflow lacks part of this run; `make publish` sends it again\n"
    assert len(read_json(RECORD)["curves"]["loss"]) == 200


def test_the_end_of_a_run_tries_once_more_and_does_not_wait_for_a_store_that_says_no(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with track("work", Config(), inputs={}, record=RECORD) as run:
        store.trouble = itertools.repeat("fails")
        run.metrics({"loss": 1.0}, 1)
        began = time.perf_counter()
    assert time.perf_counter() - began < mirror.GRACE_SECONDS["FINISHED"] / 4
    assert capsys.readouterr().err.splitlines() == [
        "MLflow does not answer (nobody is there); figures are kept and sent later",
        "MLflow lacks part of this run; `make publish` sends it again",
    ]
    assert RECORD.exists()


def test_a_run_that_fails_waits_less_for_a_store_than_one_that_is_done() -> None:
    assert mirror.SHORT_GRACE_SECONDS < mirror.GRACE_SECONDS["FINISHED"] <= 60


def test_figures_are_sent_now_and_then_not_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SEND_SECONDS", 0.2)
    made = Store()
    run = Run(record(), opened(made))
    began = time.perf_counter()
    for step in range(1, 2001):
        run.metrics({"loss": 1 / step}, step)
        time.sleep(0.01)
        if step >= 60 and made.calls:
            break
    calls, elapsed = made.calls, time.perf_counter() - began
    assert 1 <= calls <= 2 + elapsed / 0.2
    run.send()
    assert len(made.curve("loss")) == step


def test_what_a_store_refuses_is_left_out_said_once_and_holds_up_nothing(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with track("work", Config(), inputs={}, record=RECORD) as run:
        run.send()
        store.trouble = iter(["refused", "", "refused"])
        run.tags({"a" * 300: "x"})
        run.metrics({"loss": 1.0}, 1)
        run.tags({"b" * 300: "x"})
    assert store.curve("loss") == [(1, 1.0)]
    assert store.status == "FINISHED"
    assert capsys.readouterr().err.splitlines() == [
        "MLflow refuses part of this run (not such a name); the record has it",
        "MLflow lacks part of this run; `make publish` sends it again",
    ]


def test_points_that_a_reopened_run_has_are_not_sent_again_even_if_the_store_fails_first() -> None:
    store = Store()
    first = Run(record(), opened(store))
    for step in (1, 2, 3):
        first.metrics({"loss": 1 / step}, step)
    first.finish("KILLED")
    store.trouble = iter(["fails"])  # when it is asked what it has
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        again = Run(record(), opened(store))
        assert again.mirror is not None
        for step in (2, 3, 4, 5):
            again.metrics({"loss": 1 / step}, step)
            while not again.mirror.flush(5):
                pass
        again.finish("FINISHED")
    assert store.histories == ["loss", "loss"]  # once in vain, and then not for every point
    assert store.curve("loss") == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]


def test_a_run_killed_before_it_had_sent_all_goes_on_with_whole_curves_here_and_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(mirror, "SEND_SECONDS", 1000.0)  # only what came before the first point was sent is there
        patch.setattr(Run, "finish", lambda run, status: None)
        patch.setattr(Run, "tags", lambda run, values: None)
        with track("work", Config(), inputs={}, record=RECORD) as killed:
            for step in range(1, 7):
                killed.metrics({"loss": 1 / step}, step)
            killed.metrics({"validation_loss": 2.0}, 6)
            killed.text("samples/step-000006.md", "once upon")
            raise SystemExit
    assert not RECORD.exists()
    with track("work", Config(), inputs={}, record=RECORD) as run:
        assert run.id == killed.id
        for step in range(5, 10):  # from the checkpoint of step 4
            run.metrics({"loss": 1 / step}, step)
    whole = [(step, 1 / step) for step in range(1, 10)]
    assert sorted(store.curve("loss")) == whole
    assert store.curve("validation_loss") == [(6, 2.0)]
    assert store.texts == {"samples/step-000006.md": "once upon"}
    written = read_json(RECORD)
    assert written["curves"] == {"loss": [list(point) for point in whole], "validation_loss": [[6, 2.0]]}
    assert written["texts"] == store.texts
    assert not list(Path(".work/runs").iterdir())  # nothing to continue any more


def test_a_process_that_is_not_the_first_has_the_same_key_and_leaves_no_trace(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with track("work", Config(), inputs={"data": "a"}, record=None) as first:
        pass
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(mirror, "connect", None)  # whoever calls it fails
    monkeypatch.setenv("RANK", "1")
    with (
        alone("p", "work"),  # the first process is at it
        track("work", Config(), inputs={"data": "a"}, record=RECORD) as run,
    ):
        run.metrics({"loss": 1.0}, 1)
        run.tags({"status": "ok"})
        run.text("samples/a.md", "a")
        run.describe("what it is")
        run.artifact(Path("nothing.txt"))
        run.send()
    assert (run.key, run.id) == (first.key, "")
    assert sorted(Path().rglob("*")) == before
    assert capsys.readouterr().err == ""


def test_an_error_in_a_process_that_is_not_the_first_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ZeroDivisionError), track("work", Config(), inputs={}, record=None):
        raise ZeroDivisionError


def test_a_description_stands_on_the_page_of_the_run_and_in_the_record(store: Store) -> None:
    with track("work", Config(), inputs={}, record=RECORD) as run:
        run.describe("**what** it is")
    assert store.tags["mlflow.note.content"] == "**what** it is"
    assert read_json(RECORD)["tags"]["mlflow.note.content"] == "**what** it is"
