"""One run per executed stage, mirrored to MLflow as it happens and kept on disk as a record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hasten.artifacts import SCHEMA, Json, read_json, write_json
from hasten.errors import UserError
from hasten.hardware import machine
from hasten.tracking.store import connect, first_line

KEY = "hasten.key"
BATCH = 900  # MLflow takes at most 1,000 metrics in one call


class Run:
    """What a stage has to say. Values go to the record at once, and to MLflow in batches.

    A store that stops answering in the middle does not stop the work: what could not be sent is kept
    and sent with the next batch, and the record on disk has it in any case.
    """

    def __init__(self, record: Json) -> None:
        self.record = record
        self.client, self.experiment = connect()
        self.id = self._open()
        self._pending: list[tuple[str, float, int]] = []
        self._sent_at = time.monotonic()
        self._logged: dict[str, int] = {}  # last step of each curve that an earlier execution already logged
        self._warned = False

    @property
    def key(self) -> str:
        """The hash of (stage, resolved config, inputs): the same work has the same key."""
        return str(self.record["key"])

    def _open(self) -> str:
        found = self.client.search_runs(
            [self.experiment], f"tags.`{KEY}` = '{self.record['key']}'", max_results=1, order_by=["start_time DESC"]
        )
        if found:
            run_id = str(found[0].info.run_id)
            self.client.update_run(run_id, status="RUNNING", name=self.record["name"])
            names = found[0].data.tags.get("dvc_exp_names", "")
            self._join_names(names)
        else:
            run_id = str(self.client.create_run(self.experiment, run_name=self.record["name"]).info.run_id)
        self._send_tags(run_id, {KEY: self.record["key"], **self.record["tags"]})
        known = set(found[0].data.params) if found else set()
        from mlflow.entities import Param

        params = [Param(key, text(value)) for key, value in self.record["params"].items() if key not in known]
        self.client.log_batch(run_id, params=params)
        return run_id

    def _join_names(self, names: str) -> None:
        """A run that several DVC experiments share lists all of them."""
        own = self.record["tags"].get("dvc_exp_names")
        joined = [name for name in [*names.split(","), own or ""] if name]
        if joined:
            self.record["tags"]["dvc_exp_names"] = ",".join(dict.fromkeys(joined))

    def _send_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, text(value)) for key, value in tags.items()])

    def metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Figures by name; with a step they are points of a curve. None and NaN are not logged."""
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            if step is not None:
                self.record["curves"].setdefault(name, []).append([step, float(value)])
            self.record["metrics"][name] = float(value)
            self._pending.append((name, float(value), step or 0))
        if time.monotonic() - self._sent_at > 2 or len(self._pending) > BATCH:
            self.send()

    def tags(self, values: Mapping[str, Any]) -> None:
        """Facts for the table."""
        self.record["tags"].update({key: text(value) for key, value in values.items()})
        self._try(lambda: self._send_tags(self.id, values))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file to keep with the run."""
        self.record["artifacts"].append([str(path), folder])
        self._try(lambda: self.client.log_artifact(self.id, str(path), folder))

    def send(self) -> None:
        """Send what is pending."""
        from mlflow.entities import Metric

        self._sent_at = time.monotonic()
        now = int(time.time() * 1000)
        while self._pending:
            batch = self._pending[:BATCH]
            fresh = [point for point in batch if point[2] == 0 or point[2] > self._last_logged(point[0])]
            if not self._try(
                lambda fresh=fresh: self.client.log_batch(self.id, metrics=[Metric(n, v, now, s) for n, v, s in fresh])
            ):
                return
            del self._pending[:BATCH]

    def _last_logged(self, name: str) -> int:
        if name not in self._logged:
            try:
                history = self.client.get_metric_history(self.id, name)
            except Exception:  # a metric that was never logged, or a store that does not answer: nothing is known
                history = []
            self._logged[name] = max((point.step for point in history), default=-1)
        return self._logged[name]

    def _try(self, action: Any) -> bool:
        try:
            action()
        except Exception as error:
            if not self._warned:
                sys.stderr.write(f"MLflow does not answer ({first_line(error)}); figures are kept and sent later\n")
            self._warned = True
            return False
        return True

    def finish(self, status: str) -> None:
        """Send the rest and close the run."""
        self.send()
        if not self._try(lambda: self.client.set_terminated(self.id, status)) or self._pending:
            sys.stderr.write("MLflow lacks part of this run; `make publish` sends it again\n")


@contextmanager
def track(
    stage: str,
    config: Any,
    *,
    inputs: Mapping[str, str],
    record: Path | None,
    item: str = "",
    tags: Mapping[str, Any] | None = None,
) -> Iterator[Run]:
    """A run for one execution of a stage, open while the block runs.

    config: the stage's dataclass (its fields become parameters). inputs: hashes of what it reads;
    both decide the key. record: where the record goes when the block succeeds.
    """
    params = flat(config)
    plan = str(getattr(config, "plan", ""))
    content = {
        "schema": SCHEMA,
        "key": hashlib.sha256(json.dumps([stage, params, dict(inputs)], sort_keys=True).encode()).hexdigest(),
        "name": f"{stage} {item}" if item else stage,
        "stage": stage,
        "tags": {
            "plan": plan,
            "stage": stage,
            "machine": machine()["id"],
            **{f"input.{name}": value[:12] for name, value in inputs.items()},
            **provenance(),
            **{key: text(value) for key, value in (tags or {}).items()},
        },
        "params": params,
        "metrics": {},
        "curves": {},
        "artifacts": [],
    }
    with alone(plan, str(content["name"])):
        yield from _tracked(content, stage, record)


@contextmanager
def alone(plan: str, name: str) -> Iterator[None]:
    """One process per stage and plan. Raises `UserError` if another one is at it."""
    path = Path(".work", "locks", f"{plan}-{name}.lock".replace(" ", "-"))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is running {name} of plan {plan} here; wait for it or end it") from None
    try:
        yield
    finally:
        lock.release()


def _tracked(content: Json, stage: str, record: Path | None) -> Iterator[Run]:
    run = Run(content)
    start = time.perf_counter()
    try:
        yield run
    except BaseException as error:
        run.tags({"error": first_line(error)[:400]})
        run.finish("KILLED" if isinstance(error, SystemExit | KeyboardInterrupt) else "FAILED")
        raise
    run.metrics({"seconds": time.perf_counter() - start})
    run.finish("FINISHED")
    if record is not None:
        write_json(record, run.record)
    over_budget(stage, run.record["metrics"]["seconds"])


def over_budget(stage: str, seconds: float) -> None:
    """Tell the user when a stage took longer than its plan allows. A plan that cannot be read has no budget."""
    import yaml

    path = Path("params.yaml")
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        plan = None
    budgets = plan.get("budget_seconds") if isinstance(plan, dict) else None
    budget = budgets.get(stage) if isinstance(budgets, dict) else None
    if budget and seconds > budget:
        sys.stderr.write(f"{stage} took {seconds:.0f} s, the plan's budget is {budget} s\n")


def provenance() -> dict[str, str]:
    """Where a run comes from: the git commit, the DVC stage and experiment."""
    found = {
        "dvc_stage": os.environ.get("DVC_STAGE", ""),
        "dvc_exp_names": os.environ.get("DVC_EXP_NAME", ""),
        "sweep": os.environ.get("HASTEN_SWEEP", ""),
    }
    try:
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        found["mlflow.source.git.commit"] = git.stdout.strip() if git.returncode == 0 else ""
    except OSError:
        pass  # no git: a run without a commit is still a run
    return {key: value for key, value in found.items() if value}


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A dataclass, dict or list as dotted names and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return flat(fields, prefix) or {prefix.rstrip("."): type(value).__name__}
    if isinstance(value, Mapping):
        return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{prefix}{key}.").items()}
    if isinstance(value, Enum):
        return {prefix.rstrip("."): value.name}
    if isinstance(value, Path | list | tuple):
        return {prefix.rstrip("."): str(value)}
    return {prefix.rstrip("."): value}


def text(value: Any) -> str:
    """A tag's or parameter's value: MLflow keeps 5,000 characters."""
    shown = " > ".join(value) if isinstance(value, list) else str(value)
    return shown[:5000]


def replay(path: Path) -> str:
    """Send a record to the store again: `make publish`. The run's id."""
    record = read_json(path)
    content = {**record, "curves": {}, "metrics": {}, "artifacts": []}
    run = Run(content)
    for name, points in record["curves"].items():
        for step, value in points:
            run.metrics({name: value}, step)
    run.metrics({name: value for name, value in record["metrics"].items() if name not in record["curves"]})
    for artifact, folder in record["artifacts"]:
        if Path(artifact).exists():
            run.artifact(Path(artifact), folder)
    run.finish("FINISHED")
    return run.id


def annotate(record: Path, tags: Mapping[str, str], figures: Mapping[str, float | None]) -> None:
    """Add what was decided later to the run of an earlier stage, found through its record."""
    if not record.is_file():
        return
    client, experiment = connect()
    key = read_json(record)["key"]
    for found in client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1):
        for name, text_value in tags.items():
            client.set_tag(found.info.run_id, name, text(text_value))
        for name, value in figures.items():
            if value is not None:
                client.log_metric(found.info.run_id, name, value)
