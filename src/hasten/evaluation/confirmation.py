"""Confirming: the finalists against the reference, taking turns, on questions nobody has looked at.

Choosing the fastest of many noisy measurements favours lucky ones, so the finalists are measured
again. They take turns with the reference in fresh processes, there and back: A B B A for one
finalist, A B C C B A for two, so that a machine that slowly warms up or is slowly needed elsewhere
treats all alike (each trial's runs have the same mean position). Accuracy comes from the test split,
once per trial. Only raw numbers are kept here; the verdict's statistics are made from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from hasten.artifacts import SCHEMA, Json
from hasten.errors import UserError
from hasten.evaluation.contention import NOISY_CORES
from hasten.evaluation.trial import Job, Outcome, run
from hasten.scenario.base import Scenario

Row = dict[str, Any]
Runner = Callable[[Job, float], Outcome]


def confirm(
    finalists: Json,
    jobs: Mapping[str, Job],
    *,
    blocks: int,
    budget_seconds: float,
    timeout_seconds: float = 600.0,
    runner: Runner = run,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Json, list[Row]]:
    """Measure what `finalists.json` names: (`confirmation.json`, rows of `confirmation.parquet`).

    jobs: by trial, with the scenarios as in `evaluate`. blocks: fresh processes per trial and scenario, an even
    number (there and back). budget_seconds: no round begins that would probably end after it; one always runs.
    timeout_seconds: for each process. Raises `UserError` if a trial has no job.
    """
    if blocks < 2 or blocks % 2:
        raise UserError(f"blocks must be an even number of at least 2, got {blocks}")
    if budget_seconds <= 0:
        raise UserError(f"budget_seconds must be above 0, got {budget_seconds}")
    trials = {name: _trials(entry) for name, entry in finalists["scenarios"].items()}
    for trial in sorted({trial for names in trials.values() for trial in names}):
        if trial not in jobs:
            raise UserError(f"finalists must name trials of this plan {sorted(jobs)}, got {trial!r}")
    start = clock()

    def measure(job: Job) -> Outcome:
        return runner(job, timeout_seconds)

    outcomes: dict[str, Outcome] = {}
    rows: list[Row] = []
    for trial in trials_of(finalists):
        outcomes[trial] = measure(replace(jobs[trial], splits=("test",), scenarios={}))
        rows += [{"trial": trial, **row} for row in outcomes[trial].predictions]

    scenarios: Json = {}
    for index, (name, names) in enumerate(trials.items()):
        left = budget_seconds - (clock() - start)
        deadline = clock() + left / (len(trials) - index)
        rounds = _Rounds(name, {trial: jobs[trial] for trial in names}, outcomes)
        rounds.take_turns(blocks // 2, measure, clock, deadline)
        scenarios[name] = {"reference": finalists["scenarios"][name]["reference"], **rounds.record(blocks)}
    return {"schema": SCHEMA, "plan": finalists.get("plan"), "scenarios": scenarios}, rows


def trials_of(finalists: Json) -> list[str]:
    """Every trial that is to be confirmed, in any scenario, once."""
    return list(dict.fromkeys(trial for entry in finalists["scenarios"].values() for trial in _trials(entry)))


def _trials(entry: Json) -> list[str]:
    """The reference first, then the finalists; none where there is no reference to compare with."""
    reference = entry.get("reference")
    return list(dict.fromkeys([reference, *entry["finalists"]])) if reference else []


class _Rounds:
    """One scenario: who takes part, and each process' raw values. The first job is the reference's."""

    def __init__(self, scenario: str, jobs: dict[str, Job], quality: Mapping[str, Outcome]) -> None:
        self.name = scenario
        self.jobs = jobs
        for trial, job in jobs.items():
            if scenario not in job.scenarios:
                raise UserError(
                    f"scenario must be one that trial {trial} runs, {sorted(job.scenarios)}, got {scenario!r}"
                )
        self.outcomes: dict[str, list[Outcome]] = {trial: [] for trial in jobs}
        self.failed = {trial: quality[trial] for trial in jobs if quality[trial].status != "ok"}
        self.why: str | None = None

    def take_turns(
        self, rounds: int, measure: Callable[[Job], Outcome], clock: Callable[[], float], deadline: float
    ) -> None:
        """There and back, `rounds` times, or until the next round would end after the deadline."""
        for number in range(rounds):
            begun = clock()
            alive = [trial for trial in self.jobs if trial not in self.failed]
            for trial in [*alive, *reversed(alive)]:
                if self.worth_measuring(trial):
                    self._measure(trial, number, measure)
            if number + 1 < rounds and clock() + (clock() - begun) > deadline:
                self.why = f"the time budget allowed {number + 1} of {rounds} rounds"
                return

    def worth_measuring(self, trial: str) -> bool:
        """Whether the trial still runs, and somebody to compare it with."""
        reference, *finalists = self.jobs
        rivals = [reference] if trial != reference else finalists
        return trial not in self.failed and any(rival not in self.failed for rival in rivals)

    def _measure(self, trial: str, number: int, measure: Callable[[Job], Outcome]) -> None:
        job = self.jobs[trial]
        scenarios = {self.name: job.scenarios[self.name]}
        # Other prompts every round, the same ones for every trial in it.
        outcome = measure(replace(job, splits=(), scenarios=scenarios, seed=job.seed + number))
        if outcome.status == "ok":
            self.outcomes[trial].append(outcome)
        else:
            self.failed[trial] = outcome

    def record(self, blocks: int) -> Json:
        return {"blocks": blocks, "why": self.why, "trials": {trial: self._trial(trial) for trial in self.jobs}}

    def _trial(self, trial: str) -> Json:
        job, outcomes = self.jobs[trial], self.outcomes[trial]
        scenario = job.scenarios[self.name]
        failure = self.failed.get(trial)
        contention = [outcome.contention.get(self.name) for outcome in outcomes]
        samples = [outcome.samples[self.name] for outcome in outcomes]
        return {
            "status": failure.status if failure else "ok",
            "error": failure.error if failure else None,
            "validity": _validity(scenario, sum(map(len, samples)), contention) if outcomes else None,
            "headline": scenario.headline,
            "lower_is_better": scenario.lower_is_better,
            "blocks": [scenario.headline_values(block) for block in samples],
            "contention_cores": contention,
            "kernel": outcomes[0].kernel if outcomes else None,
            "variant": job.variant.name,
            "engine": job.engine.name,
        }


def _validity(scenario: Scenario, requests: int, contention: list[float | None]) -> str:
    """`noisy` if the typical process was disturbed, `preview` from too few requests, else `valid`."""
    known = sorted(cores for cores in contention if cores is not None)
    if known and known[len(known) // 2] > NOISY_CORES:
        return "noisy"
    return "preview" if requests < scenario.minimum_requests else "valid"
