"""Qualifying: one short round side by side, so that nobody gets into the final, or misses it, by luck.

Screening measures trials one after another, minutes apart, on a machine whose speed may have moved by a third
meanwhile. That is good enough to leave the slow half behind, not to say which of two baselines is the faster one
(the reference must be: a slow reference flatters everybody) nor who is ahead of whom. Those who may still be ahead
take turns (`hasten.evaluation.turns`) in one round; its ratios choose the reference and the finalists, and are then
forgotten: `confirm` measures again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hasten.errors import UserError
from hasten.evaluation.confirmation import TablePlan, Together, why_apart
from hasten.evaluation.limits import Limits
from hasten.evaluation.speedup import round_log_ratio
from hasten.evaluation.trial import Job
from hasten.evaluation.turns import Pass, SideBySide, play
from hasten.scenario.timing import Sample

LUCK = 2.0
"""Screened speeds of two trials may be off against each other by this factor."""


def taking_part(speeds: Mapping[str, float], baselines: Sequence[str], most: int) -> list[str]:
    """Who may be the reference or a finalist: the baselines that may be the fastest of them, and the fastest others
    that may beat it; at most `most` (and at least one baseline), fastest first.

    speeds: screened, by trial, more is better. Nobody if there is no baseline, or no rival.
    """
    if not baselines:
        return []
    best = max(speeds[trial] for trial in baselines)
    fastest_first = sorted(speeds, key=lambda trial: -speeds[trial])
    known = [trial for trial in fastest_first if trial in baselines and speeds[trial] * LUCK >= best]
    rivals = [trial for trial in fastest_first if trial not in baselines and speeds[trial] * LUCK >= best]
    known = known[: max(1, most - len(rivals))]
    chosen = {*known, *rivals[: most - len(known)]}
    return [trial for trial in fastest_first if trial in chosen] if len(chosen) > 1 else []


@dataclass(frozen=True)
class Qualified:
    """speeds: by trial, relative to one of them, more is better; empty if no round was played, for the reason `why`.

    failed: who could not take part, and why.
    """

    speeds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    why: str | None = None


def qualify(
    jobs: Mapping[str, Job],
    scenario: str,
    *,
    passes: int,
    budget_seconds: float,
    limits: Limits,
    peaks: Mapping[str, int | None],
    table_plan: TablePlan = SideBySide,
    clock: Callable[[], float] = time.monotonic,
) -> Qualified:
    """One round of the jobs' trials in turns.

    passes: turns there and back; budget_seconds: from the first turn on, no further pass begins after it; one always
    is played. limits: for each process, and their memory for all together. peaks: the memory that each was seen to
    hold. Raises `UserError` unless the budget is above 0.
    """
    if budget_seconds <= 0:
        raise UserError(f"time_budget_seconds must be above 0, got {budget_seconds}")
    if reason := why_apart(jobs, Together.auto, peaks, limits.memory):
        return Qualified(why=reason)

    def values(trial: str, samples: Sequence[Sample]) -> list[float]:
        return jobs[trial].scenarios[scenario].headline_values(samples)

    played: list[Pass] = []
    with table_plan(jobs, scenario, limits) as table:
        alive = [trial for trial in jobs if trial not in table.failed]
        deadline = clock() + budget_seconds
        while len(alive) > 1 and len(played) < passes and (not played or clock() < deadline):
            done = play(table, alive, values, seed=len(played), in_time=lambda: clock() < deadline)
            played += [done] if done else []
            alive = [trial for trial in jobs if trial not in table.failed]
        failed = {trial: f"{outcome.status}: {outcome.error}" for trial, outcome in table.failed.items()}
    if len(alive) < 2:
        return Qualified(failed=failed, why="fewer than two of them ran")
    lower = jobs[alive[0]].scenarios[scenario].lower_is_better
    turns = {trial: [one.values[trial] for one in played] for trial in alive}
    logs = {trial: round_log_ratio(turns[alive[0]], own, lower_is_better=lower) for trial, own in turns.items()}
    return Qualified({trial: math.exp(log) for trial, log in logs.items()}, failed)
