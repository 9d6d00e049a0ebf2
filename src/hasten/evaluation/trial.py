"""One trial: a variant on an engine, measured in a process of its own.

A fresh process for every trial, so that none inherits another's memory, threads or caches, and a
crash, a hang or the out-of-memory killer ends that trial alone. This side stays light (no torch, no
pandas): it hands a `Job` over, waits, and turns whatever happened into an `Outcome`. What runs on the
other side is in `hasten.evaluation.worker`; what lies between them in `hasten.evaluation.process`.

    outcome = run(Job(trial="int8-llamacpp", variant=..., engine=Llamacpp(), ...), Limits(600.0))
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Variant
from hasten.config import QUIET
from hasten.engine.base import Engine
from hasten.errors import UserError
from hasten.evaluation.conditions import Repetition
from hasten.evaluation.limits import Limits
from hasten.evaluation.process import Child, EndedError
from hasten.hardware import THREAD_VARIABLES, cores
from hasten.scenario.base import Scenario
from hasten.scenario.timing import Sample

if TYPE_CHECKING:
    from hasten.evaluation.continuation import Continuation


@dataclass(frozen=True)
class Job:
    """What to measure. Splits may be empty (no quality), and so may scenarios (no speed).

    tasks: the plan's folder of task folders. tokens: where scenarios draw their prompts from.
    cache: where engines keep what they build from a variant. baseline: the float checkpoint under which long
    continuations are scored; continuation: which ones, None for none.
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
    baseline: Path | None = None
    continuation: Continuation | None = None

    @property
    def draft(self) -> Variant | None:
        """The variant that guesses for it, if the engine has one."""
        return self.engine.draft_of(Variant(self.variant))


@dataclass
class Outcome:
    """What came of it. status: `ok`, `failed` (see error) or `refused` (the engine cannot run the variant; see error).

    affinity: the cores the process was confined to. arithmetic: what the multiplications compute in.
    speed: per scenario, its repetitions: samples, one per timed request, with their conditions. predictions: a row
    per item. continuations: a row per prompt. why: for what could not be read, the reason.
    """

    status: str
    error: str | None = None
    kernel: str | None = None
    native: bool | None = None
    native_format: str | None = None
    arithmetic: str | None = None
    affinity: list[int] | None = None
    load_seconds: float | None = None
    compile_seconds: float | None = None
    weight_bytes_per_token: int | None = None
    weight_bytes_per_guess: int | None = None
    kv_bytes_per_position: int | None = None
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    speed: dict[str, list[Repetition]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    continuations: list[dict[str, Any]] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        speed = {name: [part.to_json() for part in parts] for name, parts in self.speed.items()}
        return {**vars(self), "speed": speed}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Outcome:
        speed = {name: [Repetition.from_json(part) for part in parts] for name, parts in fields["speed"].items()}
        return cls(**{**fields, "speed": speed})


@dataclass(frozen=True)
class Call:
    """The worker's first command. stop_after_build: build, if anything has to be, and do no more.

    wait: load only, and wait for turns; otherwise measure everything the job asks for.
    """

    job: Job
    stop_after_build: bool
    wait: bool = False


@dataclass(frozen=True)
class Turn:
    """A waiting worker's further commands: measure a scenario, as short as a turn is."""

    scenario: str
    seed: int


@dataclass(frozen=True)
class Judge:
    """Instead of a call: hold a trial's continuations against the float baseline."""

    rows: list[dict[str, Any]]
    baseline: Path
    tokenizer: Path


LOADING = "loading"
"""A contestant's status until it is known."""
BUILT = "built"
"""Between the two sides only: the engine built what it needs, now measure it in another fresh process."""


def run(job: Job, limits: Limits) -> Outcome:
    """Measure `job` in a fresh process. Never raises for what happens there: it is in the outcome.

    Where the engine first has to build something from the variant, that happens in a process before,
    so that its memory and its libraries do not count as the engine's. The time limit is for both together.
    """
    deadline = time.monotonic() + limits.timeout_seconds
    with start(job, limits) as child:
        child.send(Call(job, stop_after_build=True))
        outcome = answer(child, deadline)
    if outcome.status != BUILT:
        return outcome
    with start(job, limits) as child:
        child.send(Call(job, stop_after_build=False))
        return _built(outcome, answer(child, deadline))


def judged(job: Job, outcome: Outcome, limits: Limits) -> Outcome:
    """The outcome with its continuations held against the float baseline, in a process of its own.

    The baseline may be many times as large as the variant: where it does not fit, or fails otherwise, the trial keeps
    what was measured, has no continuations, and `why` says the reason.
    """
    if not outcome.continuations or job.baseline is None:
        return outcome
    with start(job, limits) as child:
        child.send(Judge(outcome.continuations, job.baseline, job.tokenizer))
        try:
            found = child.receive(time.monotonic() + limits.timeout_seconds)
        except EndedError as ended:
            found = {"error": str(ended)}
    if "rows" in found:
        return replace(outcome, continuations=found["rows"])
    error = found["error"] if "error" in found else Outcome.from_json(found["outcome"]).error
    why = {**outcome.why, "continuation": f"the float baseline could not judge it: {error}"}
    return replace(outcome, continuations=[], why=why)


class Contestant:
    """A fresh process that loads a trial's engine, waits, and then measures when it is its turn.

    Entering it only starts the process, so that several can load at once; `ready` waits for it; leaving ends it.
    Waiting costs next to no processor time (measured on 2 cores: llamacpp and eager spin for 5 to 10 ms after a
    request, which the untimed request that begins the next turn covers, and take 0.01% of a core from then on). The
    limits hold for loading and for every turn.

        with Contestant(job, limits) as first, Contestant(other, limits) as second:
            if first.ready().status == second.ready().status == "ok":
                samples = first.turn("qa", seed=0)
    """

    def __init__(self, job: Job, limits: Limits) -> None:
        self.job = job
        self.limits = limits
        self.outcome = Outcome(LOADING)
        """What came of loading (no speed, no predictions), or what ended it since."""
        self._child: Child | None = None
        self._deadline = 0.0

    def __enter__(self) -> Contestant:
        self._deadline = time.monotonic() + self.limits.timeout_seconds
        self._start(stop_after_build=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process that waits now."""
        assert self._child is not None, "a contestant is a context manager"
        return self._child.pid

    def ready(self) -> Outcome:
        """Wait until it has loaded: what came of that. The time limit counts from entering."""
        if self.outcome.status == LOADING:
            assert self._child is not None, "a contestant is a context manager"
            outcome = answer(self._child, self._deadline)
            if outcome.status == BUILT:
                self._start(stop_after_build=False)
                outcome = _built(outcome, answer(self._child, self._deadline))
            self.outcome = outcome
            if outcome.status != "ok":
                self._child.close()
        return self.outcome

    def turn(self, scenario: str, seed: int) -> list[Sample] | None:
        """Measure `scenario.turn()`. None if it failed, now or before: then `outcome` says why.

        Raises `UserError` if the job has no such scenario.
        """
        if scenario not in self.job.scenarios:
            raise UserError(
                f"scenario must be one that trial {self.job.trial} runs, {sorted(self.job.scenarios)}, got {scenario!r}"
            )
        outcome = self.ready()
        if outcome.status != "ok":
            return None
        assert self._child is not None
        try:
            self._child.send(Turn(scenario, seed))
            found = self._child.receive(time.monotonic() + self.limits.timeout_seconds)
            if "samples" in found:
                return [Sample(**sample) for sample in found["samples"]]
            error = Outcome.from_json(found["outcome"]).error
        except EndedError as ended:
            error = str(ended)
        self.outcome = replace(outcome, status="failed", error=error)
        self._child.close()
        return None

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()

    def _start(self, *, stop_after_build: bool) -> None:
        self.close()
        self._child = start(self.job, self.limits)
        self._child.send(Call(self.job, stop_after_build, wait=True))


def start(job: Job, limits: Limits) -> Child:
    """A fresh worker with the job's threads, on as many cores."""
    environment = {
        **QUIET,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(job.engine.thread_count)),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return Child(limits, cores(job.engine.thread_count), environment)


def answer(child: Child, deadline: float) -> Outcome:
    """The outcome the child reports, or what its end means."""
    try:
        return Outcome.from_json(child.receive(deadline)["outcome"])
    except EndedError as ended:
        return Outcome("failed", str(ended))


def _built(build: Outcome, measured: Outcome) -> Outcome:
    """The outcome of the second process, with what the first one spent on building."""
    why = {name: reason for name, reason in measured.why.items() if name != "compile_seconds"}
    return replace(measured, compile_seconds=build.compile_seconds, why=why)
