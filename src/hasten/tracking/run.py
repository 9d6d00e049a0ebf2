"""One run per executed stage, mirrored to MLflow as it happens and kept on disk as a record.

Where several processes train together, each of them runs the stage; the first one's run is the stage's, those of the
others say nothing to anybody.
"""

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

from hasten.artifacts import SCHEMA, Json, read_json, replacing, write_json
from hasten.errors import UserError
from hasten.hardware import machine
from hasten.ranks import rank
from hasten.tracking.journal import entries, note
from hasten.tracking.mirror import KEY, Mirror, Point, text
from hasten.tracking.store import connect, first_line

DESCRIPTION = "mlflow.note.content"  # the tag that the UI shows on top of a run's page


class Run:
    """What a stage has to say. It goes to the record at once, to MLflow in the background (`hasten.tracking.mirror`).

    A store that stops answering does not stop or slow the work: what could not be sent is kept and sent later, and the
    record on disk has it in any case. mirror: None for a run that nobody hears of. journal: where the course of the run
    is kept until it is finished; if there is one already, the run was killed and this one continues it.
    """

    def __init__(self, record: Json, mirror: Mirror | None = None, journal: Path | None = None) -> None:
        self.record, self.mirror, self.journal = record, mirror, journal
        if journal is not None:
            for entry in entries(journal):
                self._take(entry)

    @property
    def key(self) -> str:
        """The hash of (stage, resolved config, inputs): the same work has the same key."""
        return str(self.record["key"])

    @property
    def id(self) -> str:
        """MLflow's; empty for a run that nobody hears of."""
        return self.mirror.id if self.mirror else ""

    def metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Figures by name; with a step they are points of a curve. None and NaN are not logged."""
        known = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        entry = {"metrics": known, "step": step, "milliseconds": int(time.time() * 1000)}
        self._say(entry, keep=step is not None)

    def text(self, name: str, content: str) -> None:
        """A short text to keep with the run, such as `samples/step-000200.md`."""
        self._say({"text": name, "content": content}, keep=True)

    def _say(self, entry: Json, keep: bool) -> None:
        if keep and self.journal is not None:
            note(self.journal, entry)
        self._take(entry)

    def _take(self, entry: Json) -> None:
        """Into the record and on to MLflow, now or from the journal of an execution that was killed."""
        if "text" in entry:
            name, content = entry["text"], entry["content"]
            self.record["texts"][name] = content
            if self.mirror:
                self.mirror.put(lambda client: client.log_text(self.id, content, name))
            return
        values, step = entry["metrics"], entry["step"]
        self.record["metrics"].update(values)
        for name, value in values.items():
            if step is not None:
                curve = self.record["curves"].setdefault(name, [])
                while curve and curve[-1][0] >= step:
                    curve.pop()  # from before a kill, after the checkpoint: now it is gone through again
                curve.append([step, value])
        if self.mirror:
            self.mirror.put(*(Point(name, value, step, entry["milliseconds"]) for name, value in values.items()))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Facts for the table."""
        self.record["tags"].update({key: text(value) for key, value in values.items()})
        if self.mirror:
            self.mirror.tags(values)

    def describe(self, markdown: str) -> None:
        """What the page of the run says on top."""
        self.tags({DESCRIPTION: markdown})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A file to keep with the run; it has to stay until the run is over."""
        self.record["artifacts"].append([str(path), folder])
        if self.mirror:
            self.mirror.put(lambda client: client.log_artifact(self.id, str(path), folder))

    def send(self) -> None:
        """Send what is pending now, and wait for it as long as the store takes it."""
        if self.mirror:
            self.mirror.flush()

    def finish(self, status: str) -> None:
        """Send the rest and close the run. A store that takes nothing is waited for a minute at most."""
        if self.mirror and not self.mirror.close(status):
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
    begun: Path | None = None,
) -> Iterator[Run]:
    """A run for one execution of a stage, open while the block runs.

    config: the stage's dataclass (its fields become parameters). inputs: hashes of what it reads;
    both decide the key. record: where the record goes when the block succeeds. begun: a folder that
    belongs to the work and outlives a kill; the run that is named there goes on, although the work is done elsewhere.
    In a process that is not the first of its job the run has the same key and is heard by nobody.
    """
    params = flat(config)
    plan = str(getattr(config, "plan", ""))
    key = hashlib.sha256(json.dumps([stage, params, dict(inputs)], sort_keys=True).encode()).hexdigest()
    content = {
        "schema": SCHEMA,
        "key": key if begun is None else continued(begun, key),
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
        "texts": {},
        "artifacts": [],
    }
    if rank() > 0:
        yield Run(content)
        return
    with alone(plan, str(content["name"])):
        yield from _tracked(content, stage, record)


def continued(folder: Path, key: str) -> str:
    """The key of the run that began the work in `folder`: `key`, if this is the first one."""
    path = folder / "run"
    if not path.is_file() and rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(key, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else key


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
    journal = Path(".work", "runs", f"{content['key'][:16]}.jsonl")
    run = Run(content, Mirror(content), journal)
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
    journal.unlink(missing_ok=True)  # not before the record is there
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


def replay(path: Path) -> str:
    """Send a record to the store again: `make publish`. The run's id."""
    record = read_json(path)
    content = {**record, "curves": {}, "metrics": {}, "texts": {}, "artifacts": []}
    run = Run(content, Mirror(content))
    for name, points in record["curves"].items():
        for step, value in points:
            run.metrics({name: value}, step)
    run.metrics({name: value for name, value in record["metrics"].items() if name not in record["curves"]})
    for name, written in record.get("texts", {}).items():
        run.text(name, written)
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
