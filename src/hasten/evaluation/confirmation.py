"""Confirming: the finalists against the reference, taking turns, on questions nobody has looked at.

Choosing the fastest of many noisy measurements favours lucky ones, so the finalists are measured
again, in *rounds*. A round starts fresh processes of the reference and of every finalist and lets them
take turns (`hasten.evaluation.turns`): one log-ratio per finalist comes out, free of what the machine did
meanwhile. Rounds are the independent repetitions: another process has other memory addresses and another
thread placement. Their spread in a first stage fixes how many rounds the wanted precision takes (Stein 1945);
the time budget may end it earlier. Accuracy comes from the test split, once per trial. Only raw numbers are
kept here; the verdict's statistics are made from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

from hasten.artifacts import SCHEMA, Json
from hasten.errors import UserError
from hasten.evaluation.limits import Limits
from hasten.evaluation.speedup import round_log_ratio, rounds_needed
from hasten.evaluation.trial import Job, Outcome, run
from hasten.evaluation.turns import OneAtATime, Pass, SideBySide, Table, play

Row = dict[str, Any]
TablePlan = Callable[[Mapping[str, Job], str, Limits], Table]
NOISY_SHARE = 0.1
"""A scenario is `noisy` if more than this share of its passes were disturbed; a round's trimmed mean bears so many."""
FEWEST_ROUNDS = 2


class Together(Enum):
    """Whether all trials of a round are loaded at the same time."""

    auto = "auto"
    always = "always"
    never = "never"


def confirm(
    finalists: Json,
    jobs: Mapping[str, Job],
    *,
    rounds: int,
    passes: int,
    precision: float,
    budget_seconds: float,
    limits: Limits,
    together: Together = Together.auto,
    runner: Callable[[Job, Limits], Outcome] = run,
    side_by_side: TablePlan = SideBySide,
    one_at_a_time: TablePlan = OneAtATime,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Json, list[Row]]:
    """Measure what `finalists.json` names: (`confirmation.json`, rows of `confirmation.parquet`).

    jobs: by trial, with the scenarios as in `evaluate`. rounds: of the first stage. passes: turns there and back per
    round. precision: the half width of the speed-up's interval that further rounds aim at, as a share (0.03 = 3%).
    budget_seconds: for the rounds; none begins that would probably end after it, one always runs. limits: for every
    process, and their memory for all of a round's together. Raises `UserError` if a trial has no job.
    """
    _check(rounds, passes, precision, budget_seconds)
    trials = {name: _trials(entry) for name, entry in finalists["scenarios"].items()}
    for trial in trials_of(finalists):
        if trial not in jobs:
            raise UserError(f"finalists must name trials of this plan {sorted(jobs)}, got {trial!r}")
    outcomes: dict[str, Outcome] = {}
    rows: list[Row] = []
    for trial in trials_of(finalists):
        outcomes[trial] = runner(replace(jobs[trial], splits=("test",), scenarios={}, continuation=None), limits)
        rows += [{"trial": trial, **row} for row in outcomes[trial].predictions]

    scenarios: Json = {}
    start = clock()
    for index, (name, names) in enumerate(trials.items()):
        left = budget_seconds - (clock() - start)
        deadline = clock() + left / (len(trials) - index)
        entry = finalists["scenarios"][name]
        taking_part = {trial: jobs[trial] for trial in names}
        apart = why_apart(taking_part, together, entry.get("peak_memory_bytes") or {}, limits.memory)
        match = _Match(name, taking_part, {trial: outcomes[trial] for trial in names})
        match.play(
            one_at_a_time if apart else side_by_side,
            limits,
            rounds=rounds,
            passes=1 if apart else passes,
            precision=precision,
            deadline=deadline,
            clock=clock,
        )
        scenarios[name] = {"reference": entry["reference"], "together": not apart, "apart": apart, **match.record()}
    return {"schema": SCHEMA, "plan": finalists.get("plan"), "scenarios": scenarios}, rows


def _check(rounds: int, passes: int, precision: float, budget_seconds: float) -> None:
    if rounds < FEWEST_ROUNDS:
        raise UserError(f"rounds must be at least {FEWEST_ROUNDS}, got {rounds}")
    if passes < 1:
        raise UserError(f"passes must be at least 1, got {passes}")
    if not 0 < precision < 1:
        raise UserError(f"precision_percent must be between 0 and 100, got {100 * precision:g}")
    if budget_seconds <= 0:
        raise UserError(f"time_budget_seconds must be above 0, got {budget_seconds}")


def why_apart(
    jobs: Mapping[str, Job], together: Together, peaks: Mapping[str, int | None], memory_bytes: int
) -> str | None:
    """Why the trials must not be loaded at the same time; None if they may."""
    if together is Together.never:
        return "the option `together` is never"
    if together is Together.always or not jobs:
        return None
    if any(device != "cpu" for job in jobs.values() for device in job.engine.devices):
        return "trials that share a GPU are measured one at a time"
    known = [peaks.get(trial) for trial in jobs]
    if all(known) and sum(peak or 0 for peak in known) > memory_bytes:
        total, allowed = sum(peak or 0 for peak in known) / 2**30, memory_bytes / 2**30
        return f"together they need {total:.1f} GiB of memory, {allowed:.1f} GiB are allowed"
    return None


def trials_of(finalists: Json) -> list[str]:
    """Every trial that is to be confirmed, in any scenario, once."""
    return list(dict.fromkeys(trial for entry in finalists["scenarios"].values() for trial in _trials(entry)))


def _trials(entry: Json) -> list[str]:
    """The reference first, then the finalists; none where there is no reference to compare with."""
    reference = entry.get("reference")
    return list(dict.fromkeys([reference, *entry["finalists"]])) if reference else []


class _Match:
    """One scenario: who takes part, and every round's passes. The first job is the reference's."""

    def __init__(self, scenario: str, jobs: dict[str, Job], quality: Mapping[str, Outcome]) -> None:
        self.name, self.jobs = scenario, jobs
        for trial, job in jobs.items():
            if scenario not in job.scenarios:
                raise UserError(
                    f"scenario must be one that trial {trial} runs, {sorted(job.scenarios)}, got {scenario!r}"
                )
        self.rounds: list[list[Pass]] = []
        self.failed = {trial: outcome for trial, outcome in quality.items() if outcome.status != "ok"}
        self.kernels: dict[str, str | None] = {}
        self.first_stage = self.wanted = 0
        self.why: str | None = None

    @property
    def alive(self) -> list[str]:
        """Who is still to be measured: the reference and at least one rival, or nobody."""
        left = [trial for trial in self.jobs if trial not in self.failed]
        return left if len(left) > 1 and left[0] == next(iter(self.jobs)) else []

    def play(
        self,
        plan: TablePlan,
        limits: Limits,
        *,
        rounds: int,
        passes: int,
        precision: float,
        deadline: float,
        clock: Callable[[], float],
    ) -> None:
        """Rounds until the interval is narrow enough, or until the next would end after the deadline."""
        self.wanted = rounds
        while self.alive and len(self.rounds) < self.wanted:
            begun = clock()
            if self._round(plan, limits, passes, lambda: clock() < deadline) and len(self.rounds) == rounds:
                self.wanted = max(rounds, *(self._needed(trial, precision) for trial in self.alive[1:]), 0)
            if len(self.rounds) < self.wanted and clock() + (clock() - begun) > deadline:
                self.why = f"the time budget allowed {len(self.rounds)} of {self.wanted} rounds"
                break
        self.first_stage = min(rounds, len(self.rounds))

    def _round(self, plan: TablePlan, limits: Limits, passes: int, in_time: Callable[[], bool]) -> bool:
        """Whether a round was played; a trial that fails in it is out, the others go on.

        Beside a busy process one pass may take minutes: past the deadline a round ends with the passes it has.
        """
        played: list[Pass] = []
        with plan({trial: self.jobs[trial] for trial in self.alive}, self.name, limits) as table:
            self.failed |= table.failed
            while (trials := self.alive) and len(played) < passes and (not played or in_time()):
                seed = len(self.rounds) * passes + len(played)
                done = play(table, trials, self._headline, seed=seed, in_time=in_time)
                self.failed |= table.failed
                played += [done] if done else []
            self.kernels |= table.kernels
        if self.alive:
            self.rounds.append(played)
        return bool(self.alive)

    def _headline(self, trial: str, samples: Any) -> list[float]:
        return self.jobs[trial].scenarios[self.name].headline_values(samples)

    def _needed(self, trial: str, precision: float) -> int:
        reference = next(iter(self.jobs))
        lower = self.jobs[trial].scenarios[self.name].lower_is_better
        ratios = [
            round_log_ratio(mine, theirs, lower_is_better=lower)
            for mine, theirs in zip(self._values(reference), self._values(trial), strict=True)
        ]
        return rounds_needed(ratios, precision)

    def _values(self, trial: str) -> list[list[list[float]]]:
        """Rounds of passes of values; a pass that a trial was not part of is left out."""
        return [[one.values[trial] for one in played if trial in one.values] for played in self.rounds]

    def record(self) -> Json:
        return {
            "rounds_first_stage": self.first_stage,
            "rounds_wanted": self.wanted,
            "why": self.why,
            "conditions": [
                [one.conditions.to_json() | {"attempts": one.attempts, "quiet": one.conditions.quiet} for one in r]
                for r in self.rounds
            ],
            "trials": {trial: self._trial(trial) for trial in self.jobs},
        }

    def _trial(self, trial: str) -> Json:
        job, failure, values = self.jobs[trial], self.failed.get(trial), self._values(trial)
        scenario = job.scenarios[self.name]
        return {
            "status": failure.status if failure else "ok",
            "error": failure.error if failure else None,
            "validity": self._validity(scenario.minimum_requests, values),
            "headline": scenario.headline,
            "lower_is_better": scenario.lower_is_better,
            "rounds": values,
            "kernel": self.kernels.get(trial),
            "variant": job.variant.name,
            "engine": job.engine.name,
        }

    def _validity(self, minimum_requests: int, values: list[list[list[float]]]) -> str | None:
        """`noisy` if too many passes were disturbed, `preview` from too few requests, else `valid`."""
        played = [one for passes in self.rounds for one in passes]
        if not played:
            return None
        if sum(not one.conditions.quiet for one in played) > NOISY_SHARE * len(played):
            return "noisy"
        return "preview" if sum(len(one) for passes in values for one in passes) < minimum_requests else "valid"
