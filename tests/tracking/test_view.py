"""The ready-made table of a plan's trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hasten.artifacts import write_json
from hasten.tracking.store import connect
from hasten.tracking.view import share_view


def test_a_plans_view_filters_its_trials_and_names_their_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    write_json(tmp_path / "artifacts/mine/tasks/colours/manifest.json", {"schema": 1})
    verdict = tmp_path / "reports/mine/verdict.json"
    write_json(verdict, {"plan": "mine", "scenarios": {"qa": {"headline": "latency_seconds_p50"}}})

    link = share_view(verdict)

    client, experiment = connect()
    state = json.loads(client.get_experiment(experiment).tags["mlflow.sharedViewState.mine"])
    assert link == f"/#/experiments/{experiment}/runs?viewStateShareKey=mine"
    assert state["searchFilter"] == "tags.plan = 'mine' and tags.stage = 'evaluate'"
    for column in ("metrics.`qa_speedup`", "metrics.`validation_accuracy_colours`", "tags.`qa.decision`"):
        assert column in state["selectedColumns"]
