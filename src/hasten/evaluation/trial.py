"""One trial: a variant on an engine, measured in a process of its own.

A fresh process for every trial, so that none inherits another's memory, threads or caches, and a
crash, a hang or the out-of-memory killer ends that trial alone. This side stays light (no torch, no
pandas): it hands a `Job` over, waits, and turns whatever happened into an `Outcome`. What runs on the
other side is in `hasten.evaluation.worker`.

    outcome = run(Job(trial="int8@llamacpp", variant=..., engine=Llamacpp(), ...), timeout_seconds=600)
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hasten.config import QUIET
from hasten.engine.base import Engine
from hasten.errors import UserError
from hasten.scenario.base import Scenario
from hasten.scenario.timing import Sample

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)
"""What numeric libraries read when they start: every engine gets the same threads."""


@dataclass(frozen=True)
class Job:
    """What to measure. Splits may be empty (no quality), and so may scenarios (no speed).

    tasks: the plan's folder of task folders. tokens: where scenarios draw their prompts from.
    cache: where engines keep what they build from a variant.
    """

    trial: str
    variant: Path
    engine: Engine
    tasks: Path
    tokens: Path
    tokenizer: Path
    cache: Path
    splits: tuple[str, ...] = ()
    scenarios: dict[str, Scenario] = field(default_factory=dict)
    seed: int = 0


@dataclass
class Outcome:
    """What came of it. status: `ok`, `failed` (see error) or `refused` (the engine cannot run the variant; see error).

    samples: per scenario, one per timed request. contention: per scenario, the cores other processes
    used meanwhile. why: for what could not be read, the reason.
    """

    status: str
    error: str | None = None
    kernel: str | None = None
    native: bool | None = None
    native_format: str | None = None
    load_seconds: float | None = None
    compile_seconds: float | None = None
    weight_bytes_per_token: int | None = None
    peak_memory_bytes: int | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    contention: dict[str, float | None] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        fields = json.loads(text)
        samples = {name: [Sample(**row) for row in rows] for name, rows in fields.pop("samples").items()}
        return cls(samples=samples, **fields)


@dataclass(frozen=True)
class Call:
    """What the worker process is told: the job, where to write the outcome, whether to stop after building."""

    job: Job
    outcome: Path
    stop_after_build: bool


BUILT = "built"
"""Between the two sides only: the engine built what it needs, now measure it in another fresh process."""


def run(job: Job, timeout_seconds: float) -> Outcome:
    """Measure `job` in a fresh process. Never raises for what happens there: it is in the outcome.

    Where the engine first has to build something from the variant, that happens in a process before,
    so that its memory and its libraries do not count as the engine's.
    """
    if timeout_seconds <= 0:
        raise UserError(f"timeout_seconds must be above 0, got {timeout_seconds}")
    deadline = time.monotonic() + timeout_seconds
    outcome = _process(job, timeout_seconds, timeout_seconds, stop_after_build=True)
    if outcome.status != BUILT:
        return outcome
    remaining = max(deadline - time.monotonic(), 0.001)
    measured = _process(job, remaining, timeout_seconds, stop_after_build=False)
    measured.why.pop("compile_seconds", None)
    return replace(measured, compile_seconds=outcome.compile_seconds)


def _process(job: Job, remaining: float, timeout_seconds: float, *, stop_after_build: bool) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        path = Path(folder, "outcome.json")
        worker = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-m", "hasten.evaluation.worker"],
            stdin=subprocess.PIPE,
            stdout=2,  # an engine's chatter must not end up in this process' output
            env=_environment(job.engine.thread_count),
            start_new_session=True,  # a group of its own, so that all of it can be ended
        )
        try:
            assert worker.stdin is not None
            try:
                # The pipe stays open: the worker ends itself when it closes, so no crash of ours leaves it behind.
                worker.stdin.write(pickle.dumps(Call(job, path, stop_after_build)))
                worker.stdin.flush()
                code = worker.wait(remaining)
            except BrokenPipeError:
                code = worker.wait()
            except subprocess.TimeoutExpired:
                return Outcome("failed", f"it was still running after {timeout_seconds:g} s and was stopped")
            if path.is_file():
                return Outcome.from_json(path.read_text(encoding="utf-8"))
            return Outcome("failed", death(code))
        finally:
            _end(worker)


def _end(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def death(code: int) -> str:
    """In one sentence, what an exit code without an outcome means."""
    if code >= 0:
        return f"the process ended with exit code {code} before it could report"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        return "the process was killed (SIGKILL), most likely because memory ran out"
    return f"the process crashed ({name})"


def _environment(threads: int) -> dict[str, str]:
    return {
        **QUIET,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
