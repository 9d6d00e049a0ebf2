from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hasten.artifacts import read_json, write_json
from hasten.errors import UserError
from hasten.tracking import Run, track
from hasten.tracking import run as tracking
from hasten.tracking.run import alone, annotate, flat, over_budget, replay, text
from hasten.training.options import Precision

Runs = Callable[[], list[Any]]
RECORD = Path("artifacts/p/runs/work.json")


@dataclass
class Inner:
    learning_rate: float = 0.1
    precision: Precision = Precision.auto


@dataclass
class Config:
    plan: str = "p"
    seed: int = 0
    inner: Inner = field(default_factory=Inner)


def work(
    config: Config | None = None, *, inputs: dict[str, str] | None = None, item: str = "", values: Any = None
) -> Run:
    """A whole run with one figure and one tag."""
    with track("work", config or Config(), inputs=inputs or {"data": "a" * 64}, record=RECORD, item=item) as run:
        run.metrics(values or {"accuracy": 0.5})
        run.tags({"lineage": ["baseline", "int8"]})
    return run


def points(store: Path, name: str) -> list[tuple[int, float]]:
    with sqlite3.connect(store) as database:
        return database.execute("select step, value from metrics where key = ? order by step", (name,)).fetchall()


def test_a_run_shows_its_stage_config_inputs_and_figures(runs: Runs) -> None:
    work(item="int8")
    (run,) = runs()
    assert (run.info.run_name, run.info.status) == ("work int8", "FINISHED")
    assert run.data.params == {"plan": "p", "seed": "0", "inner.learning_rate": "0.1", "inner.precision": "auto"}
    assert run.data.metrics["accuracy"] == 0.5
    assert run.data.metrics["seconds"] > 0
    tags = run.data.tags
    assert (tags["plan"], tags["stage"], tags["lineage"]) == ("p", "work", "baseline > int8")
    assert tags["input.data"] == "a" * 12
    assert len(tags["machine"]) == 12


def test_the_same_work_opens_its_run_again_instead_of_making_another(runs: Runs, store: Path) -> None:
    first = work(values={"accuracy": 0.5})
    second = work(values={"accuracy": 0.6})
    (run,) = runs()
    assert first.id == second.id == run.info.run_id
    assert run.data.metrics["accuracy"] == 0.6
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    "change",
    [
        {"config": Config(seed=1)},
        {"config": Config(plan="other")},
        {"config": Config(inner=Inner(precision=Precision.float32))},
        {"inputs": {"data": "b" * 64}},
        {"inputs": {"more": "a" * 64}},
    ],
    ids=["seed", "plan", "nested option", "input", "input's name"],
)
def test_other_work_is_another_run(runs: Runs, change: dict[str, Any]) -> None:
    work()
    work(**change)
    assert len({run.info.run_id for run in runs()}) == 2


def test_a_curve_that_was_partly_logged_before_a_kill_has_no_point_twice(store: Path) -> None:
    def train(first: int, last: int) -> None:
        with track("work", Config(), inputs={}, record=RECORD) as run:
            for step in range(first, last):
                run.metrics({"loss": 1 / step}, step)

    train(1, 7)
    train(5, 10)  # resumed from the checkpoint of step 4
    assert points(store, "loss") == [(step, pytest.approx(1 / step)) for step in range(1, 10)]


def test_the_record_holds_everything_the_run_said(store: Path) -> None:
    Path("figures.txt").write_text("x")
    with track("work", Config(), inputs={"data": "a"}, record=RECORD, tags={"engine": "eager"}) as run:
        run.metrics({"loss": 2.0}, 1)
        run.metrics({"loss": 1.0}, 2)
        run.metrics({"accuracy": 0.5, "unknown": None, "broken": math.nan, "endless": math.inf})
        run.artifact(Path("figures.txt"), "plots")
        assert not RECORD.exists()  # not before the work is done
    record = read_json(RECORD)
    assert record["schema"] == 1
    assert record["curves"] == {"loss": [[1, 2.0], [2, 1.0]]}
    assert {key: value for key, value in record["metrics"].items() if key != "seconds"} == {
        "loss": 1.0,
        "accuracy": 0.5,
    }
    assert record["artifacts"] == [["figures.txt", "plots"]]
    assert record["tags"]["engine"] == "eager"
    assert record["key"] == run.key


def test_a_failed_run_is_marked_with_its_reason_and_leaves_no_record(runs: Runs) -> None:
    with pytest.raises(UserError), track("work", Config(), inputs={}, record=RECORD) as run:
        run.metrics({"loss": 2.0}, 1)
        raise UserError("the loss is nan at step 1\nsecond line")
    (found,) = runs()
    assert found.info.status == "FAILED"
    assert found.data.tags["error"] == "the loss is nan at step 1"
    assert found.data.metrics["loss"] == 2.0  # what was known is kept
    assert not RECORD.exists()


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt()], ids=["sigterm", "ctrl-c"])
def test_a_run_that_is_ended_from_outside_is_marked_killed(runs: Runs, error: BaseException) -> None:
    with pytest.raises(type(error)), track("work", Config(), inputs={}, record=RECORD):
        raise error
    assert [run.info.status for run in runs()] == ["KILLED"]
    assert not RECORD.exists()


def test_a_run_that_succeeds_after_a_failure_is_finished(runs: Runs) -> None:
    with pytest.raises(ZeroDivisionError), track("work", Config(), inputs={"data": "a" * 64}, record=RECORD):
        raise ZeroDivisionError("division by zero")
    work()
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert RECORD.exists()


@pytest.mark.usefixtures("store")
def test_figures_are_sent_in_batches_and_none_is_lost(store: Path) -> None:
    with track("work", Config(), inputs={}, record=None) as run:
        for step in range(1, 501):
            run.metrics({"a": float(step), "b": -float(step), "c": 0.0}, step)
    for name, last in (("a", 500.0), ("b", -500.0), ("c", 0.0)):
        found = points(store, name)
        assert [step for step, _ in found] == list(range(1, 501))
        assert found[-1] == (500, last)


def test_a_store_that_dies_in_mid_run_does_not_stop_the_work(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = Path("plot.txt")
    artifact.write_text("x")
    with track("work", Config(), inputs={}, record=RECORD) as run:
        run.metrics({"before": 1.0})
        run.send()
        store.write_bytes(b"this is no database any more" * 1000)
        for step in range(1, 4):
            run.metrics({"loss": 1.0 / step}, step)
            run.send()
        run.tags({"status": "ok"})
        run.artifact(artifact)
    record = read_json(RECORD)
    assert record["curves"]["loss"] == [[1, 1.0], [2, 0.5], [3, pytest.approx(1 / 3)]]
    assert record["tags"]["status"] == "ok"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2  # said once, and how to mend it
    assert told[0].startswith("MLflow does not answer (")
    assert "make publish" in told[1]


def test_what_could_not_be_sent_is_sent_when_the_store_answers_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with track("work", Config(), inputs={}, record=RECORD) as run:
        with monkeypatch.context() as patch:
            patch.setattr(run.mirror, "client", None)  # whatever is asked of it raises
            run.metrics({"loss": 3.0}, 1)
            run.send()
            run.metrics({"loss": 2.0}, 2)
            run.send()
        assert points(store, "loss") == []
        run.metrics({"loss": 1.0}, 3)
    assert points(store, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_an_empty_store_is_rebuilt_from_the_records(
    store: Path, empty_store: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("plot.txt").write_text("picture")
    with track("work", Config(), inputs={"data": "a"}, record=RECORD, item="x", tags={"engine": "eager"}) as run:
        for step in (1, 2, 3):
            run.metrics({"loss": 1 / step}, step)
        run.metrics({"accuracy": 0.75})
        run.artifact(Path("plot.txt"), "plots")
    (before,) = runs()
    other = store.with_name("other.db")
    other.write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    for _ in range(2):  # the second time nothing is new
        run_id = replay(RECORD)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{other}")
    found = client.search_runs([client.get_experiment_by_name("hasten").experiment_id])
    assert [run.info.run_id for run in found] == [run_id]
    (after,) = found
    assert (after.info.run_name, after.info.status) == (before.info.run_name, "FINISHED")
    assert after.data.metrics == before.data.metrics
    assert after.data.params == before.data.params
    ours = {key: value for key, value in before.data.tags.items() if not key.startswith("mlflow.")}
    assert {key: value for key, value in after.data.tags.items() if not key.startswith("mlflow.")} == ours
    assert points(other, "loss") == points(store, "loss")
    assert [file.path for file in client.list_artifacts(run_id, "plots")] == ["plots/plot.txt"]


def test_replaying_needs_no_artifact_that_is_gone(store: Path, runs: Runs) -> None:
    Path("plot.txt").write_text("picture")
    with track("work", Config(), inputs={}, record=RECORD) as run:
        run.artifact(Path("plot.txt"))
    Path("plot.txt").unlink()
    assert replay(RECORD) == runs()[0].info.run_id


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("sqlite:///{folder}", "is not a file that can be written"),
        ("sqlite:///file:{folder}/readonly.db?mode=ro&uri=true", "attempt to write a readonly database"),
        ("sqlite:///{folder}/garbage.db", "file is not a database"),
        ("sqlite:////proc/none/mlflow.db", "/proc/none"),
        ("nonsense://x", "nonsense"),
        ("postgresql+nosuchdriver://localhost/x", "nosuchdriver"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_sentence_before_any_work(
    store: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, uri: str, words: str, capfd: Any
) -> None:
    store.with_name("readonly.db").write_bytes(empty_store.read_bytes())
    store.with_name("garbage.db").write_bytes(b"garbage" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=store.parent))
    started = False
    with pytest.raises(UserError) as error, track("work", Config(), inputs={}, record=RECORD):
        started = True
    assert not started
    assert str(error.value).startswith(f"the MLflow store {uri.format(folder=store.parent)} cannot be used: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not RECORD.exists()


@pytest.mark.usefixtures("store")
def test_two_processes_at_the_same_stage_of_a_plan_are_refused_by_the_lock() -> None:
    script = (
        "from hasten.tracking.run import alone\nfrom hasten.errors import UserError\nimport sys\n"
        "for plan, name in (('p', 'work x'), ('p', 'work y'), ('q', 'work x')):\n"
        "    try:\n        with alone(plan, name): print('free')\n"
        "    except UserError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with alone("p", "work x"):
        held = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert held.stdout.splitlines() == [
        "another process is running work x of plan p here; wait for it or end it",
        "free",  # another item of the same stage
        "free",  # another plan
    ]
    with alone("p", "work x"):  # given back, so not held for ever
        pass


def test_a_second_run_of_the_same_stage_is_refused_before_it_touches_the_first(runs: Runs) -> None:
    with track("work", Config(), inputs={"data": "a" * 64}, record=RECORD):
        with pytest.raises(UserError, match="another process is running work of plan p"):
            work()
        assert [run.info.status for run in runs()] == ["RUNNING"]
    assert [run.info.status for run in runs()] == ["FINISHED"]


def test_dvc_experiments_that_share_a_run_are_all_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second", "first"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        work()
    monkeypatch.delenv("DVC_EXP_NAME")
    work()
    (run,) = runs()
    assert run.data.tags["dvc_exp_names"] == "first,second"


def test_a_run_outside_of_git_and_dvc_is_still_a_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("DVC_STAGE", "evaluate@int8")
    work()
    tags = runs()[0].data.tags
    assert tags["dvc_stage"] == "evaluate@int8"
    assert "mlflow.source.git.commit" not in tags


@pytest.mark.usefixtures("store")
def test_what_is_decided_later_is_added_to_the_run_of_the_earlier_stage(runs: Runs) -> None:
    work()
    annotate(RECORD, {"qa.decision": "non-inferior"}, {"qa.speedup": 2.5, "none": None})
    annotate(Path("no/such/record.json"), {"a": "b"}, {})  # a trial without a record is left alone
    (run,) = runs()
    assert run.data.tags["qa.decision"] == "non-inferior"
    assert run.data.metrics["qa.speedup"] == 2.5


def test_the_default_store_is_a_file_of_the_repository_wherever_dvc_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.tracking.store import uri

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert uri() == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", "/somewhere/else")  # an experiment runs in a copy
    assert uri() == "sqlite:////somewhere/else/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert uri() == "http://127.0.0.1:5000"


def test_a_config_becomes_dotted_names_and_plain_values() -> None:
    config = {"scenario": {"qa": Inner(0.5, Precision.bfloat16)}, "path": Path("a/b"), "devices": ["cpu"], "none": None}
    assert flat(config) == {
        "scenario.qa.learning_rate": 0.5,
        "scenario.qa.precision": "bfloat16",
        "path": "a/b",
        "devices": "['cpu']",
        "none": None,
    }

    @dataclass
    class Empty:
        pass

    assert flat({"compression": Empty()}) == {"compression": "Empty"}  # identity and full differ only in their name


def test_values_are_cut_to_what_mlflow_keeps() -> None:
    assert text(["a", "b"]) == "a > b"
    assert len(text("x" * 9000)) == 5000


def test_a_stage_over_its_budget_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    over_budget("work", 11.0)  # no plan, no budget
    Path("params.yaml").write_text("budget_seconds: {work: 10}")
    over_budget("work", 9.0)
    over_budget("other", 99.0)
    assert capsys.readouterr().err == ""
    over_budget("work", 11.4)
    assert capsys.readouterr().err == "work took 11 s, the plan's budget is 10 s\n"


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("plan", ["a: [1", "budget_seconds:", "- 1", ""])
def test_a_broken_plan_does_not_fail_a_stage_that_is_done(plan: str) -> None:
    Path("params.yaml").write_text(plan)
    work()
    assert RECORD.exists()


def test_a_key_does_not_depend_on_where_or_when(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "machine", lambda: {"id": "elsewhere"})
    first = work().key
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    monkeypatch.chdir(store.parent)
    assert work().key == first
    write_json(Path("r.json"), json.loads(RECORD.read_text()))  # the record is strict JSON
