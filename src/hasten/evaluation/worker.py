"""The other side of a trial: load, answer, time, report, in a process that does nothing else.

`hasten.evaluation.child` connects it with whoever waits for the outcome. An answer is sent in one piece
when all is done: no answer means that the process died.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from hasten import peak
from hasten.artifacts import Variant, load_checkpoint
from hasten.engine.base import Session
from hasten.errors import UserError
from hasten.evaluation import memory
from hasten.evaluation.conditions import Repetition, Watch
from hasten.evaluation.trial import BUILT, Call, Job, Judge, Outcome, Turn
from hasten.scenario.base import Report, Scenario, part_seed
from hasten.scenario.prompts import PromptSource
from hasten.scenario.timing import check_clock

LONGEST_ERROR = 300
DRAW_SECONDS = 0.5


class Line(Protocol):
    """Whoever gives the commands."""

    def receive(self) -> Any:
        """The next command."""
        ...

    def answer(self, **fields: Any) -> None:
        """An answer to it."""
        ...

    def doing(self, what: str) -> None:
        """What comes next."""
        ...


def serve(line: Line) -> None:
    """Follow commands until one fails; then there is nothing left to ask this process for."""
    try:
        call = line.receive()
        if isinstance(call, Judge):
            from hasten.evaluation import continuation

            line.doing("judging continuations")
            line.answer(rows=continuation.judge(call.rows, call.baseline, call.tokenizer))
        elif not call.wait:
            line.answer(outcome=measure(call.job, line, stop_after_build=call.stop_after_build).to_json())
        else:
            _take_turns(call, line)
    except BaseException as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        line.answer(outcome=Outcome("failed", sentence(error)).to_json())
    sys.stderr.flush()
    line.receive()  # wait to be ended: numeric libraries take seconds to tear down, and some crash doing it


def _take_turns(call: Call, line: Line) -> None:
    prompts = prompts_of(call.job)
    outcome, session = load(call.job, line, stop_after_build=call.stop_after_build)
    if session is None:
        line.answer(outcome=outcome.to_json())
        return
    line.answer(outcome=outcome.to_json())
    while True:
        turn = line.receive()
        assert isinstance(turn, Turn)
        line.doing(f"running {turn.scenario}")
        scenario = call.job.scenarios[turn.scenario].turn()
        samples = scenario.measure(session, prompts, turn.seed, lambda done, total: None)
        line.answer(samples=[asdict(sample) for sample in samples])


def sentence(error: BaseException) -> str:
    """An error on one line: a user error as it is, any other with its type."""
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3] + "..."


def load(job: Job, line: Line, *, stop_after_build: bool = False) -> tuple[Outcome, Session | None]:
    """The engine with the variant in it, and what is known by then. Without a session where it cannot run or stops."""
    variant = load_checkpoint(job.variant)
    if not isinstance(variant, Variant):
        raise UserError(f"{job.variant} is not a variant: its manifest.json must have kind 'variant'")
    support = job.engine.supports(variant)
    if not support:
        return Outcome("refused", support.reason or "the engine gave no reason"), None
    for name, scenario in job.scenarios.items():
        if scenario.context_tokens > job.engine.max_context:
            raise UserError(
                f"max_context of engine {job.engine.name} must be at least {scenario.context_tokens} "
                f"for scenario {name}, got {job.engine.max_context}"
            )
    outcome = Outcome("ok", native=support.native, native_format=support.native_format)
    if hasattr(os, "sched_getaffinity"):
        outcome.affinity = sorted(os.sched_getaffinity(0))
    else:
        outcome.why["affinity"] = f"{sys.platform} does not confine processes to cores"
    cached = _files(job.cache)
    line.doing("loading")
    peak.reset_peak()
    session = job.engine.load(variant, job.cache)
    gc.collect()
    gc.freeze()  # the collector must not walk through the libraries' many objects while requests are timed
    outcome.compile_seconds = session.compile_seconds
    if _files(job.cache) - cached:
        if stop_after_build:
            session.close()
            outcome.status = BUILT
            return outcome, None
    elif session.compile_seconds > 0 and session.kept:
        outcome.why["compile_seconds"] = "built by an earlier run; this is the time to find it again"
    outcome.kernel = session.kernel
    outcome.arithmetic = session.arithmetic
    outcome.load_seconds = session.load_seconds
    outcome.weight_bytes_per_token = session.weight_bytes_per_token
    outcome.weight_bytes_per_guess = session.weight_bytes_per_guess
    outcome.kv_bytes_per_position = session.kv_bytes_per_position
    return outcome, session


def measure(job: Job, line: Line, *, stop_after_build: bool = False) -> Outcome:
    """Everything the job asks for, in this process."""
    prompts = prompts_of(job) if job.scenarios else None
    outcome, session = load(job, line, stop_after_build=stop_after_build)
    if session is None:
        return outcome
    try:
        for name, scenario in job.scenarios.items():
            line.doing(f"running {name}")
            assert prompts is not None
            outcome.speed[name] = repetitions(job, name, scenario, session, prompts)
        outcome.memory = session.memory()
        outcome.peak_memory_bytes, why = peak.peak_bytes()
        if why:
            outcome.why["peak_memory_bytes"] = why
        gpu = memory.gpu_bytes(job.engine.devices)
        outcome.peak_gpu_memory_bytes = gpu.bytes
        if gpu.why or gpu.source:
            outcome.why["peak_gpu_memory_bytes"] = gpu.why or f"read through {gpu.source}"
        # Last, so that the libraries that read tasks do not count as the engine's memory.
        if job.splits:
            outcome.predictions = _predictions(job, session, line)
        if job.continuation is not None:
            from hasten.evaluation import continuation

            line.doing("continuing texts")
            with _progress(f"{job.trial}: continuation") as report:
                outcome.continuations = continuation.generate(session, job, report)
        line.doing("closing")
    finally:
        session.close()
    return outcome


def _files(folder: Path) -> set[Path]:
    """What engines have built so far."""
    return {path for path in folder.rglob("*") if path.is_file()}


def prompts_of(job: Job) -> PromptSource:
    """Where prompts come from, read before the engine loads, so that no tokenizer counts as the engine's memory."""
    from hasten.tokenizer.translating import translation

    return PromptSource(job.tokens, translation(job.tokenizer, job.variant))


def repetitions(job: Job, name: str, scenario: Scenario, session: Session, prompts: PromptSource) -> list[Repetition]:
    """The scenario in its parts; one that was disturbed is measured again while patience lasts.

    Again with the same prompts; the least disturbed attempt is kept. The choice looks at the machine only, never at the
    result. An attempt that would probably end after `patience_seconds` of repeating does not begin.
    """
    patience = scenario.patience_seconds
    kept: list[Repetition] = []
    with _progress(f"{job.trial}: {name}") as report:
        for number, part in enumerate(scenario.parts()):
            attempts = 0
            best: Repetition | None = None
            while True:
                attempts += 1
                with Watch(job.engine.devices) as watch:
                    samples = part.measure(session, prompts, part_seed(job.seed, number), report)
                found = watch.conditions
                if best is None or found.disturbance < best.conditions.disturbance:
                    best = Repetition(samples, found)
                patience -= found.seconds if attempts > 1 else 0
                if found.quiet or found.seconds > patience:
                    break
            kept.append(Repetition(best.samples, best.conditions, attempts))
    # Where others computed, a reader that had to wait for a core looks like an engine that hides part of the time.
    if trusted := [sample for part in kept if part.conditions.quiet for sample in part.samples]:
        check_clock(trusted)
    return kept


def _predictions(job: Job, session: Session, line: Line) -> list[dict[str, object]]:
    from hasten.evaluation.quality import answer
    from hasten.task.data import TaskData
    from hasten.tokenizer.translating import own_tokenizer

    tokenizer = own_tokenizer(job.tokenizer, job.variant)
    vocabulary = max(tokenizer.vocab_size, int(Variant(job.variant).config.get("vocab_size", 0)))
    rows: list[dict[str, object]] = []
    for path in task_folders(job.tasks):
        data = TaskData(path)
        for split in job.splits:
            line.doing(f"answering {path.name} ({split})")
            with _progress(f"{job.trial}: {path.name} ({split})") as report:
                rows += answer(session, data, tokenizer, split, job.engine.max_context, vocabulary, report)
    return rows


def task_folders(tasks: Path) -> list[Path]:
    """The task folders below `tasks`, by name. Raises `UserError` if there is none."""
    folders = sorted(path.parent for path in tasks.glob("*/manifest.json"))
    if not folders:
        raise UserError(f"{tasks} must hold at least one task folder with a manifest.json, got none")
    return folders


@contextmanager
def _progress(description: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import Progress

    # Drawn between requests only: a thread that draws would compete with what is timed.
    with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(description, total=None)
        drawn = 0.0

        def report(done: int, total: int) -> None:
            nonlocal drawn
            bar.update(task, completed=done, total=total)
            if done == total or time.monotonic() - drawn > DRAW_SECONDS:
                bar.refresh()
                drawn = time.monotonic()

        yield report
