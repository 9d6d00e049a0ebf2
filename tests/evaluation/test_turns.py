from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from hasten.evaluation.conditions import Conditions
from hasten.evaluation.limits import Limits
from hasten.evaluation.trial import Job, Outcome
from hasten.evaluation.turns import MOST_ATTEMPTS, OneAtATime, SideBySide, play
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.fakes import FakeEngine

QUIET, LOUD = Conditions(1.0, 2, 0.0, 0.0), Conditions(1.0, 2, 1.5, 0.0)


def sample(seconds: float) -> Sample:
    return Sample(seconds / 2, seconds / 2, seconds, 8, 8, seconds)


def latency(trial: str, samples: Sequence[Sample]) -> list[float]:
    return [one.latency_seconds for one in samples]


def job(trial: str) -> Job:
    folder = Path("unused")
    scenarios = {"qa": Qa(requests=3), "other": Qa()}
    return Job(trial, folder / trial, FakeEngine(), folder, folder, folder, folder, ("test",), scenarios)


class Counting:
    """A table where the n-th turn takes n seconds."""

    def __init__(self, dies: dict[str, int] | None = None) -> None:
        self.failed: dict[str, Outcome] = {}
        self.kernels: dict[str, str | None] = {}
        self.turns: list[tuple[str, int]] = []
        self.dies = dies or {}
        self.watch = Watching(QUIET)

    def turn(self, trial: str, seed: int) -> list[Sample] | None:
        self.turns.append((trial, seed))
        if len(self.turns) == self.dies.get(trial):
            self.failed[trial] = Outcome("failed", "it crashed")
            return None
        return [sample(float(len(self.turns)))]


class Watching:
    """What the machine does in each attempt, as told."""

    def __init__(self, *conditions: Conditions) -> None:
        self.left = list(conditions)

    def __call__(self):
        return self

    def __enter__(self):
        self.conditions = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return self

    def __exit__(self, *_):
        pass


def once(table, trials=("a", "b", "c"), seed=0, watching=None, in_time=lambda: True):
    table.watch = watching or table.watch
    return play(table, trials, latency, seed=seed, in_time=in_time)


def test_a_steady_drift_falls_on_everybody_alike():
    table = Counting()
    played = once(table)
    assert [trial for trial, _ in table.turns] == ["a", "b", "c", "c", "b", "a"]
    assert {trial: sum(values) for trial, values in played.values.items()} == {"a": 7, "b": 7, "c": 7}


def test_everybody_turns_round_in_his_turn():
    orders = []
    for seed in range(3):
        table = Counting()
        once(table, seed=seed)
        orders.append("".join(trial for trial, _ in table.turns))
    assert orders == ["abccba", "bcaacb", "cabbac"]


def test_all_are_asked_the_same_on_the_way_there_and_something_else_on_the_way_back():
    seeds = set()
    for number in range(4):
        table = Counting()
        once(table, seed=number)
        there, back = {seed for _, seed in table.turns[:3]}, {seed for _, seed in table.turns[3:]}
        assert len(there) == len(back) == 1
        assert there.isdisjoint(back)
        assert seeds.isdisjoint(there | back)
        seeds |= there | back


def test_a_disturbed_pass_is_played_again_and_the_quiet_one_counts():
    table = Counting()
    played = once(table, watching=Watching(LOUD, QUIET))
    assert (played.attempts, played.conditions) == (2, QUIET)
    assert played.values["a"] == [7.0, 12.0]


def test_the_least_disturbed_attempt_counts_when_none_is_quiet():
    worse = Conditions(1.0, 2, 1.9, 0.0)
    played = once(Counting(), watching=Watching(worse, LOUD, worse))
    assert (played.attempts, played.conditions) == (MOST_ATTEMPTS, LOUD)
    assert played.values["a"] == [7.0, 12.0]


def test_a_pass_is_not_repeated_when_time_is_up():
    played = once(Counting(), watching=Watching(LOUD, QUIET), in_time=lambda: False)
    assert (played.attempts, played.conditions) == (1, LOUD)


def test_a_pass_in_which_somebody_failed_does_not_count():
    table = Counting(dies={"b": 2})
    assert once(table) is None
    assert table.failed["b"].error == "it crashed"


class Player:
    """Stands for a loaded worker."""

    log: ClassVar[list[str]] = []

    def __init__(self, job: Job, limits: Limits) -> None:
        self.job, self.outcome = job, Outcome("ok", kernel=f"kernel of {job.trial}")

    def __enter__(self):
        Player.log.append(f"start {self.job.trial}")
        return self

    def __exit__(self, *_):
        Player.log.append(f"end {self.job.trial}")

    def ready(self) -> Outcome:
        Player.log.append(f"ready {self.job.trial}")
        if self.job.trial == "c":
            self.outcome = Outcome("refused", "cannot")
        return self.outcome

    def turn(self, scenario: str, seed: int) -> list[Sample] | None:
        if self.job.trial == "b":
            self.outcome = Outcome("failed", "it hung")
            return None
        return [sample(1.0)]


def test_side_by_side_starts_all_before_it_waits_for_any_and_ends_all():
    Player.log = []
    jobs = {trial: job(trial) for trial in "abc"}
    with SideBySide(jobs, "qa", Limits(9), start=Player) as table:
        assert Player.log == ["start a", "start b", "start c", "ready a", "ready b", "ready c"]
        assert list(table.failed) == ["c"]
        assert table.turn("a", 0) is not None
        assert table.turn("b", 0) is None
    assert table.failed["b"].error == "it hung"
    assert table.kernels["a"] == "kernel of a"
    assert Player.log[6:] == ["end c", "end b", "end a"]


def test_side_by_side_ends_all_when_it_is_interrupted_while_they_load(monkeypatch):
    Player.log = []
    monkeypatch.setattr(Player, "ready", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), SideBySide({"a": job("a")}, "qa", Limits(9), start=Player):
        pass
    assert Player.log == ["start a", "end a"]


def test_one_at_a_time_runs_the_whole_scenario_in_a_process_of_its_own():
    jobs = []

    def runner(job: Job, limits: Limits) -> Outcome:
        jobs.append(job)
        if job.trial == "b":
            return Outcome("failed", "it crashed")
        return Outcome("ok", kernel="Q8_0", speed={"qa": [SimpleNamespace(samples=[sample(1.0)] * 3)]})

    with OneAtATime({trial: job(trial) for trial in "ab"}, "qa", Limits(9), runner=runner) as table:
        assert len(table.turn("a", 5) or []) == 3
        assert table.turn("b", 5) is None
    assert [(one.trial, one.seed, one.splits, list(one.scenarios)) for one in jobs] == [
        ("a", 5, (), ["qa"]),
        ("b", 5, (), ["qa"]),
    ]
    assert (table.kernels["a"], table.failed["b"].error) == ("Q8_0", "it crashed")
