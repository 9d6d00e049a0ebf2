"""Who is on the frontier."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation.statistics import Estimate
from hasten.reporting.frontier import Point, frontier, in_turns, points
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


def test_who_took_turns_stands_where_that_put_him() -> None:
    screened = [point("base", 0.6, 0.1), point("int4", 0.6, 0.12), point("int8", 0.6, 0.05), point("slow", 0.6, 0.9)]
    entry = {
        "reference": "base",
        "qualifying": {"speeds": {"base": 1.0, "int4": 1.4, "int8": 1.25}},
        "confirmed": {"base": {"speedup": None}, "int4": {"speedup": {"ratio": 1.6, "ci95": [1.5, 1.7]}}},
    }
    base, int4, int8, slow = in_turns(screened, entry)
    assert (base, slow) == (screened[0], screened[3])
    confirmed, qualified = int4.ratio(base.figure.value), int8.ratio(base.figure.value)
    assert [confirmed.low, confirmed.value, confirmed.high] == pytest.approx([1.5, 1.6, 1.7])
    assert qualified.value == pytest.approx(1.25)
    assert qualified.high / qualified.low == pytest.approx(1.1 / 0.9)  # as wide as it was screened


def test_more_is_better_takes_turns_the_other_way_round() -> None:
    screened = [point("base", 0.6, 100.0, lower_is_better=False), point("int4", 0.6, 90.0, lower_is_better=False)]
    entry = {"reference": "base", "qualifying": {"speeds": {"base": 1.0, "int4": 1.5}}, "confirmed": {}}
    assert in_turns(screened, entry)[1].figure.value == pytest.approx(150.0)
