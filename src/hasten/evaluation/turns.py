"""Taking turns: the reference and the finalists are measured side by side, a fraction of a second each.

The speed of a machine that is not one's own moves by a third within seconds (a neighbour on the same core, a clock),
and no counter shows it. Processes that run one after another are then compared by luck. Loaded processes that take
short turns, there and back (A B C C B A, then B C A A C B), all meet the same seconds: their ratio stays while their
speeds move. A turn begins with an untimed request, because the rival has had the caches; who goes first changes from
pass to pass, because the one that turns round has them twice. Who waits for its turn sleeps.

Where all do not fit into memory together, or share one GPU, every turn is a fresh process of its own, with a whole
run of the scenario in it: the same order, at a coarser grain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from hasten.evaluation.conditions import Conditions, Watch
from hasten.evaluation.limits import Limits
from hasten.evaluation.trial import Contestant, Job, Outcome, run
from hasten.hardware import cores
from hasten.scenario.timing import Sample

MOST_ATTEMPTS = 3
"""How often a pass is played, at most, until nobody disturbed it."""
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Pass:
    """Everybody's turns there and back: the headline's values by trial, and who else was computing meanwhile."""

    values: Values
    conditions: Conditions
    attempts: int


class Table(Protocol):
    """Where a scenario's trials take turns; a context manager for one round. failed: who is out, and why."""

    failed: dict[str, Outcome]
    kernels: dict[str, str | None]

    def __enter__(self) -> Table: ...

    def __exit__(self, *_: object) -> None: ...

    def turn(self, trial: str, seed: int) -> list[Sample] | None:
        """The trial's next samples; None if it failed."""
        ...

    def watch(self) -> Watch:
        """For a pass: watches the cores and devices that the trials use."""
        ...


def watch_over(jobs: Mapping[str, Job]) -> Watch:
    """A watch over the cores and devices that these jobs are confined to."""
    devices = sorted({device for job in jobs.values() for device in job.engine.devices})
    return Watch(devices, cores=cores(max(job.engine.thread_count for job in jobs.values())))


class SideBySide:
    """Every trial in a fresh process, loaded before the first turn; all of them end with the round."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        scenario: str,
        limits: Limits,
        start: Callable[[Job, Limits], Contestant] = Contestant,
    ) -> None:
        self.scenario, self.jobs = scenario, jobs
        self.failed: dict[str, Outcome] = {}
        self.kernels: dict[str, str | None] = {}
        self._stack = ExitStack()
        self._players = {
            trial: start(replace(job, splits=(), scenarios={scenario: job.scenarios[scenario]}), limits)
            for trial, job in jobs.items()
        }

    def __enter__(self) -> SideBySide:
        try:
            for player in self._players.values():
                self._stack.enter_context(player)
            for trial, player in self._players.items():
                self._note(trial, player.ready())
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def turn(self, trial: str, seed: int) -> list[Sample] | None:
        samples = self._players[trial].turn(self.scenario, seed)
        if samples is None:
            self._note(trial, self._players[trial].outcome)
        return samples

    def watch(self) -> Watch:
        return watch_over(self.jobs)

    def _note(self, trial: str, outcome: Outcome) -> None:
        self.kernels[trial] = outcome.kernel
        if outcome.status != "ok":
            self.failed[trial] = outcome


class OneAtATime(AbstractContextManager["OneAtATime"]):
    """Every turn in a fresh process of its own."""

    def __init__(
        self,
        jobs: Mapping[str, Job],
        scenario: str,
        limits: Limits,
        runner: Callable[[Job, Limits], Outcome] = run,
    ) -> None:
        self.scenario, self.limits, self.runner = scenario, limits, runner
        self.failed: dict[str, Outcome] = {}
        self.kernels: dict[str, str | None] = {}
        self._jobs = {
            trial: replace(job, splits=(), scenarios={scenario: job.scenarios[scenario]}) for trial, job in jobs.items()
        }

    def __exit__(self, *_: object) -> None:
        """Every turn has ended its own process."""

    def turn(self, trial: str, seed: int) -> list[Sample] | None:
        outcome = self.runner(replace(self._jobs[trial], seed=seed), self.limits)
        self.kernels[trial] = outcome.kernel
        if outcome.status != "ok":
            self.failed[trial] = outcome
            return None
        return [sample for repetition in outcome.speed[self.scenario] for sample in repetition.samples]

    def watch(self) -> Watch:
        return watch_over(self._jobs)


def play(
    table: Table,
    trials: Sequence[str],
    values: Callable[[str, Sequence[Sample]], list[float]],
    *,
    seed: int,
    in_time: Callable[[], bool],
) -> Pass | None:
    """One pass: every trial once there and once back; None if one of them failed in it.

    The same prompts for all on the way there, others on the way back. A pass that others disturbed is played again
    while `in_time` says so, at most `MOST_ATTEMPTS` times; the least disturbed one counts. The choice looks at the
    others' processor time only, never at the values.
    """
    kept: Pass | None = None
    attempts = 0
    first = seed % len(trials)
    there = [*trials[first:], *trials[:first]]
    while kept is None or (not kept.conditions.quiet and attempts < MOST_ATTEMPTS and in_time()):
        attempts += 1
        got: dict[str, list[Sample]] = {trial: [] for trial in trials}
        with table.watch() as watched:
            for way, order in enumerate((there, there[::-1])):
                for trial in order:
                    samples = table.turn(trial, 2 * seed + way)
                    if samples is None:
                        return None
                    got[trial] += samples
        conditions = watched.conditions
        if kept is None or conditions.disturbance < kept.conditions.disturbance:
            kept = Pass({trial: values(trial, samples) for trial, samples in got.items()}, conditions, attempts)
    return replace(kept, attempts=attempts)
