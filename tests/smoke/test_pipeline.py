"""The whole graph with the `miniature` plan: verdict, MLflow, skipping, re-running, surviving a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.smoke.conftest import Run, environment

TRIALS = [
    "baseline-eager",
    "baseline-llamacpp",
    "int8-eager",
    "int8-llamacpp",
    "shallow-openvino",
    "shallow-int4-onnxruntime",
    "small-int4-native",
]


def executed(output: str) -> set[str]:
    """Stages that DVC ran, by name."""
    return set(re.findall(r"Running stage '([^']+)'", output))


def query(repository: Path, sql: str) -> list[tuple[str, ...]]:
    with sqlite3.connect(repository / "mlflow.db") as store:
        return store.execute(sql).fetchall()


def test_a_plan_ends_with_a_verdict(finished: Path) -> None:
    verdict = json.loads((finished / "reports/miniature/verdict.json").read_text())
    entry = verdict["scenarios"]["qa"]
    assert entry["reference"] in ("baseline-eager", "baseline-llamacpp")
    assert entry["champion"] in TRIALS
    assert {"int8-eager"} <= set(entry["rejected"]), "a dequantised run must never compete on speed"
    assert verdict["plan"] == "miniature"
    for name in ("frontier.png", "report.html", "metrics.json", "run.json"):
        assert (finished / "reports/miniature" / name).stat().st_size > 0


def test_every_trial_is_measured(finished: Path) -> None:
    for trial in TRIALS:
        measured = json.loads((finished / f"artifacts/miniature/measurements/{trial}.json").read_text())
        assert measured["status"] == "ok", measured["error"]
        assert measured["speed"]["qa"]["latency_seconds_p50"] > 0
        assert measured["quality"]["jsonl"]["validation"]["n"] == 70
        assert measured["peak_memory_bytes"] > 0
        assert measured["build"]["seconds"] > 0
        assert measured["native"] == (trial != "int8-eager")
        assert (measured["draft"] or {}).get("variant") == ("small" if trial == "small-int4-native" else None)
        assert (measured["speed"]["qa"]["acceptance_rate"] is None) == (trial != "small-int4-native")
        for field in ("mbu", "mfu", "load_seconds", "weight_bytes_per_token", "kernel", "arithmetic"):
            assert measured[field], f"{trial}: {field}: {measured['why'].get(field)}"


def test_engines_agree_on_the_float_baseline(finished: Path) -> None:
    import pandas as pd

    folder = finished / "artifacts/miniature/predictions"
    eager, llamacpp = (pd.read_parquet(folder / f"baseline-{name}.parquet") for name in ("eager", "llamacpp"))
    assert (eager["output"] == llamacpp["output"]).mean() >= 0.99


def test_mlflow_holds_one_run_per_stage_and_the_champion(finished: Path) -> None:
    names = [name for (name,) in query(finished, "select name from runs")]
    stages = ["prepare", "pretrain", "finetune", "select", "confirm", "report"]
    variants = ["baseline", "int8", "shallow", "shallow-int4", "healed", "small", "small-int4"]
    expected = stages + [f"compress {name}" for name in variants] + [f"evaluate {name}" for name in TRIALS]
    assert sorted(names) == sorted(expected)
    assert query(finished, "select distinct status from runs") == [("FINISHED",)]
    aliases = query(finished, "select name, alias from registered_model_aliases")
    assert aliases == [("hasten-miniature-qa", "champion")]
    tags = dict(
        query(finished, "select key, value from tags join runs using (run_uuid) where name = 'evaluate int8-llamacpp'")
    )
    assert tags["variant"] == "int8"
    assert tags["engine"] == "llamacpp"
    assert tags["lineage"] == "baseline > int8"
    assert "qa.decision" in tags


def test_repeating_runs_nothing_but_the_probe(finished: Path, run: Run) -> None:
    before = query(finished, "select count(*) from runs")
    assert executed(run("dvc", "repro").stdout) == {"probe"}
    assert query(finished, "select count(*) from runs") == before


def test_publish_rebuilds_an_empty_store(finished: Path, run: Run) -> None:
    names = sorted(query(finished, "select name from runs"))
    curve = query(finished, "select step, value from metrics where key = 'train_loss' order by step, value")
    (finished / "mlflow.db").rename(finished / "mlflow.db.old")
    run("python", "pipelines/publish.py")
    assert sorted(query(finished, "select name from runs")) == names
    assert query(finished, "select step, value from metrics where key = 'train_loss' order by step, value") == curve
    assert query(finished, "select alias from registered_model_aliases") == [("champion",)]


def test_editing_a_method_re_runs_only_what_follows_from_it(finished: Path, run: Run) -> None:
    edited = finished / "conf/compression/rtn.yaml", finished / "conf/compression/gptq.yaml"
    originals = [path.read_text() for path in edited]
    try:
        edited[0].write_text(originals[0].replace("head: true", "head: false"))
        stale = set(json.loads(run("dvc", "status", "--json").stdout))
        edited[0].write_text(originals[0])
        edited[1].write_text(originals[1].replace("head: true", "head: false"))
        ran = executed(run("dvc", "repro", "select").stdout)
        left = set(json.loads(run("dvc", "status", "--json").stdout))
    finally:
        for path, original in zip(edited, originals, strict=True):
            path.write_text(original)
    assert stale == {"probe", "compress@int8", "compress@shallow-int4"}
    assert ran == {"probe", "compress@small-int4", "evaluate@small-int4-native", "select"}
    assert left == {"probe", "confirm", "report"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "pretrain", "finetune", "evaluate@int8-llamacpp", "confirm"])
def test_a_killed_stage_is_completed_by_the_next_repro(finished: Path, run: Run, stage: str) -> None:
    done = subprocess.Popen(["dvc", "repro", "-f", "-s", stage], cwd=finished, env=environment())
    script = {"evaluate@int8-llamacpp": "evaluate"}.get(stage, stage)
    deadline = time.monotonic() + 60
    victim = None
    while victim is None and time.monotonic() < deadline:
        found = subprocess.run(
            ["pgrep", "-P", str(done.pid), "-f", f"pipelines/{script}"], capture_output=True, text=True
        )
        victim = int(found.stdout.split()[0]) if found.stdout.split() else None
        time.sleep(0.05)
    assert victim is not None
    time.sleep(3)
    os.kill(victim, signal.SIGKILL)
    assert done.wait(60) != 0
    run("dvc", "repro")
    assert (finished / "reports/miniature/verdict.json").is_file()
    assert "up to date" in run("dvc", "status", "pretrain", "finetune", "evaluate", "confirm", "report").stdout


@pytest.mark.slow
def test_an_experiment_changes_one_value_and_is_named_in_mlflow(finished: Path, run: Run) -> None:
    run("git", "add", "-A")
    run("git", "-c", "user.name=smoke", "-c", "user.email=smoke@example.invalid", "commit", "-qm", "results")
    run("dvc", "exp", "run", "-n", "three-heads", "-S", "conf/finetune.yaml:seed=3")
    assert yaml.safe_load((finished / "conf/finetune.yaml").read_text())["seed"] == 3
    names = query(finished, "select distinct value from tags where key = 'dvc_exp_names'")
    assert names == [("three-heads",)]


@pytest.mark.slow
def test_a_sweep_compresses_and_evaluates_job_by_job(finished: Path, run: Run) -> None:
    shape = ["scenario.qa.requests=4", "scenario.qa.prompt_tokens=8", "scenario.qa.output_tokens=8"]
    grid = ["compression=rtn", "compression.bits=4,8", "engine=eager,llamacpp", "engine.max_context=64"]
    run("python", "pipelines/sweep.py", "-m", "plan=miniature", *grid, *shape)
    rows = query(finished, "select run_uuid, value from tags where key = 'sweep'")
    assert len(rows) == 4
    assert len({value for _, value in rows}) == 1
