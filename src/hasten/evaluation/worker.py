"""The other side of a trial: load, answer, time, report, in a process that does nothing else.

Started by `hasten.evaluation.trial.run` as `python -m hasten.evaluation.worker`; the job comes
through standard input, which then stays open for as long as somebody wants the result. The outcome
is written in one piece at the very end: no outcome means that the process died.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.artifacts import Variant, load_checkpoint
from hasten.engine.base import Session
from hasten.errors import UserError
from hasten.evaluation import memory
from hasten.evaluation.contention import NOISY_CORES, Contention
from hasten.evaluation.trial import BUILT, Call, Job, Outcome
from hasten.scenario.base import Report, Scenario
from hasten.scenario.prompts import PromptSource
from hasten.scenario.timing import Sample

LONGEST_ERROR = 300
DRAW_SECONDS = 0.5


def main() -> None:
    call = pickle.load(sys.stdin.buffer)
    assert isinstance(call, Call)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        outcome = measure(call.job, stop_after_build=call.stop_after_build)
    except BaseException as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        outcome = Outcome("failed", sentence(error))
    partial = call.outcome.with_suffix(".partial")
    partial.write_text(outcome.to_json(), encoding="utf-8")
    partial.replace(call.outcome)
    sys.stderr.flush()
    os._exit(0)  # numeric libraries take seconds to tear down, and some crash doing it


def _leave_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def sentence(error: BaseException) -> str:
    """An error on one line: a user error as it is, any other with its type."""
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3] + "..."


def measure(job: Job, *, stop_after_build: bool = False) -> Outcome:
    """Everything the job asks for, in this process."""
    variant = load_checkpoint(job.variant)
    if not isinstance(variant, Variant):
        raise UserError(f"{job.variant} is not a variant: its manifest.json must have kind 'variant'")
    support = job.engine.supports(variant)
    if not support:
        return Outcome("refused", support.reason or "the engine gave no reason")
    for name, scenario in job.scenarios.items():
        if scenario.context_tokens > job.engine.max_context:
            raise UserError(
                f"max_context of engine {job.engine.name} must be at least {scenario.context_tokens} "
                f"for scenario {name}, got {job.engine.max_context}"
            )
    outcome = Outcome("ok", native=support.native, native_format=support.native_format)
    cached = _files(job.cache)
    memory.reset_peak()
    session = job.engine.load(variant, job.cache)
    gc.collect()
    gc.freeze()  # the collector must not walk through the libraries' many objects while requests are timed
    try:
        outcome.compile_seconds = session.compile_seconds
        if _files(job.cache) - cached:
            if stop_after_build:
                outcome.status = BUILT
                return outcome
        elif session.compile_seconds > 0:
            outcome.why["compile_seconds"] = "built by an earlier run; this is the time to find it again"
        outcome.kernel = session.kernel
        outcome.load_seconds = session.load_seconds
        outcome.weight_bytes_per_token = session.weight_bytes_per_token
        if job.scenarios:
            _speed(job, session, outcome)
        outcome.memory = session.memory()
        outcome.peak_memory_bytes, why = memory.peak_bytes()
        if why:
            outcome.why["peak_memory_bytes"] = why
        if job.splits:  # last, so that the libraries that read tasks do not count as the engine's memory
            outcome.predictions = _predictions(job, session, variant)
    finally:
        session.close()
    return outcome


def _files(folder: Path) -> set[Path]:
    """What engines have built so far."""
    return {path for path in folder.rglob("*") if path.is_file()}


def _speed(job: Job, session: Session, outcome: Outcome) -> None:
    prompts = PromptSource(job.tokens)
    for name, scenario in job.scenarios.items():
        with _progress(f"{job.trial}: {name}") as report:
            outcome.samples[name], quietest = quietly(scenario, session, prompts, job.seed, report)
        outcome.contention[name] = quietest.cores
        if quietest.why:
            outcome.why[f"contention.{name}"] = quietest.why


def quietly(
    scenario: Scenario, session: Session, prompts: PromptSource, seed: int, report: Report
) -> tuple[list[Sample], Contention]:
    """Measure; while other processes disturb, measure again; keep the least disturbed attempt.

    The choice looks at the others' processor time only, never at the result.
    """
    start = time.monotonic()
    kept: tuple[float, list[Sample], Contention] | None = None
    while True:
        begun, watch = time.monotonic(), Contention()
        with watch:
            samples = scenario.measure(session, prompts, seed, report)
        if watch.cores is None or watch.cores <= NOISY_CORES:
            return samples, watch
        if kept is None or watch.cores < kept[0]:
            kept = watch.cores, samples, watch
        now = time.monotonic()
        if now - start + (now - begun) > scenario.patience_seconds:
            return kept[1:]


def _predictions(job: Job, session: Session, variant: Variant) -> list[dict[str, object]]:
    from hasten.evaluation.quality import answer
    from hasten.task.data import TaskData
    from hasten.tokenizer.base import load_tokenizer

    tokenizer = load_tokenizer(job.tokenizer)
    vocabulary = max(tokenizer.vocab_size, int(variant.config.get("vocab_size", 0)))
    rows: list[dict[str, object]] = []
    for path in task_folders(job.tasks):
        data = TaskData(path)
        for split in job.splits:
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


if __name__ == "__main__":
    main()
