"""A fresh MLflow store per test: a copy of one that was created once (creating takes seconds)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Runs = Callable[[], list[Any]]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store's file; the working directory is the test's own."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store, path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    for name in ("MLFLOW_EXPERIMENT_NAME", "DVC_STAGE", "DVC_EXP_NAME", "DVC_ROOT", "HASTEN_SWEEP"):
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.fixture
def runs(store: Path) -> Runs:
    """What the store holds, oldest first."""

    def search() -> list[Any]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{store}")
        experiment = client.get_experiment_by_name("hasten")
        found = client.search_runs([experiment.experiment_id]) if experiment else []
        return sorted(found, key=lambda run: run.info.start_time)

    return search
