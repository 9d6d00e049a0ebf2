"""Who is on the frontier."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation.statistics import Estimate
from hasten.reporting.frontier import Point, frontier, points
from tests.reporting.conftest import Study


def point(name: str, accuracy: float, seconds: float, *, lower_is_better: bool = True) -> Point:
    estimates = (Estimate(accuracy, accuracy, accuracy, 9), Estimate(seconds, 0.9 * seconds, 1.1 * seconds, 9))
    return Point(name, name, "eager", *estimates, lower_is_better)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=25))
def test_nothing_dominates_the_frontier_and_it_dominates_the_rest(figures: list[tuple[int, int]]) -> None:
    trials = [point(str(i), float(accuracy), float(seconds)) for i, (accuracy, seconds) in enumerate(figures)]
    best = frontier(trials)
    for trial in trials:
        beaten = [
            other
            for other in trials
            if other.speed >= trial.speed
            and other.accuracy.value >= trial.accuracy.value
            and (other.speed, other.accuracy.value) != (trial.speed, trial.accuracy.value)
        ]
        twins = [b for b in best if (b.speed, b.accuracy.value) == (trial.speed, trial.accuracy.value)]
        assert bool(twins) != bool(beaten)


def test_only_native_trials_with_figures_are_points(study: Study) -> None:
    names = [p.trial for p in points(study.measurements, "qa")]
    assert names[0] == "depth-int4@llamacpp" and len(names) == 8
    assert not {"int8@eager", "int4@eager", "int8-channel@llamacpp"} & set(names)
    assert points(study.measurements, "dialogue") == []


def test_the_ratio_turns_the_interval_round() -> None:
    found = point("a", 0.5, 0.1).ratio(0.2)
    assert found.low < found.value == 2.0 < found.high
    assert point("a", 0.5, 300.0, lower_is_better=False).ratio(100.0).value == 3.0
