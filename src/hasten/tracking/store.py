"""Where runs are kept: the MLflow store of this repository, or the one the environment names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hasten.errors import UserError

EXPERIMENT = "hasten"


def root() -> Path:
    """The repository. DVC runs experiments in a copy of it, and says where the original is."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root() / 'mlflow.db'}"


def connect() -> tuple[Any, str]:
    """A client and the experiment's id. Raises `UserError` if the store cannot be read and written."""
    import logging

    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow"):  # after the import, which sets levels of its own
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # as an error MLflow logs a traceback for what is raised

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    refuse_unwritable_file(uri())
    try:
        client = MlflowClient(uri())
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = None if os.environ.get("MLFLOW_TRACKING_URI") else (root() / "mlruns").as_uri()
            identity = client.create_experiment(name, artifact_location=location)
        else:
            identity = experiment.experiment_id
        client.set_experiment_tag(identity, "hasten", "speed and accuracy of every variant")
    except (MlflowException, OSError, ImportError) as error:  # a database's driver may not be installed
        raise UserError(f"the MLflow store {uri()} cannot be used: {first_line(error)}") from None
    except Exception as error:  # SQLAlchemy's errors share no base with MLflow's
        if not type(error).__module__.startswith("sqlalchemy"):
            raise
        raise UserError(f"the MLflow store {uri()} cannot be used: {first_line(error)}") from None
    return client, str(identity)


def refuse_unwritable_file(store: str) -> None:
    """Say at once what MLflow would say after ten attempts and a hundred seconds. Raises `UserError`."""
    path = Path(store.removeprefix("sqlite:///").split("?")[0])
    if not store.startswith("sqlite:///") or store.startswith("sqlite:///file:"):
        return
    there = path if path.exists() else path.parent
    if path.is_dir() or (there.exists() and not os.access(there, os.W_OK)):
        raise UserError(f"the MLflow store {store} cannot be used: {there} is not a file that can be written")


def first_line(error: BaseException) -> str:
    """An error's first line: what went wrong without the trace that libraries append."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
