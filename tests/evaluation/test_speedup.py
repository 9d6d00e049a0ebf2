"""Speed-ups: rounds count, passes cancel drift, Stein's two stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.evaluation.speedup import round_log_ratio, rounds, rounds_needed, speedup
from hasten.evaluation.statistics import Estimate, Unknown

LOGS = st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=9)


def played(logs: list[float], scale: float = 1.0, passes: int = 3) -> list[list[list[float]]]:
    """Rounds of equal passes of three values around scale x exp(log)."""
    return [[[scale * math.exp(x) * wobble for wobble in (0.9, 1.0, 1.2)]] * passes for x in logs]


def estimate(found: Estimate | Unknown) -> Estimate:
    assert isinstance(found, Estimate)
    return found


@settings(max_examples=30, deadline=None)
@given(LOGS)
def test_speedup_of_one_stage_is_a_t_interval_of_the_log_ratios(logs: list[float]) -> None:
    from scipy.stats import t

    found = estimate(speedup(played(logs, 2.0), played([0.0] * len(logs)), first_stage=len(logs)))
    mean, error = np.mean(logs) + math.log(2), np.std(logs, ddof=1) / math.sqrt(len(logs))
    reach = t.isf(0.025, len(logs) - 1) * error
    assert np.log([found.value, found.low, found.high]) == pytest.approx([mean, mean - reach, mean + reach])
    assert found.n == len(logs)


@settings(max_examples=20, deadline=None)
@given(LOGS)
def test_speedup_of_the_sides_swapped_is_the_inverse(logs: list[float]) -> None:
    forth = estimate(speedup(played(logs), played([0.0] * len(logs)), first_stage=len(logs)))
    back = estimate(speedup(played([0.0] * len(logs)), played(logs), first_stage=len(logs)))
    assert forth.value == pytest.approx(1 / back.value) and forth.low == pytest.approx(1 / back.high)


def test_a_machine_that_slows_both_sides_changes_nothing() -> None:
    drift = [0.0, 0.3, -0.2, 0.5]
    found = estimate(speedup(played(drift, 2.0), played(drift), first_stage=4))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_only_the_first_stage_says_how_uncertain_and_later_rounds_narrow() -> None:
    first, later = [0.0, 0.1, -0.1, 0.05], [0.4, -0.4, 0.3, -0.3]
    sides = played([*first, *later]), played([0.0] * 8)
    found = estimate(speedup(*sides, first_stage=4))
    alone = estimate(speedup(sides[0][:4], sides[1][:4], first_stage=4))
    assert found.n == 8
    assert math.log(found.high / found.low) == pytest.approx(math.log(alone.high / alone.low) / math.sqrt(2))


def test_more_is_better_for_throughput() -> None:
    sides = played([0.0, 0.1, 0.05]), played([0.0, 0.1, 0.05], 3.0)
    assert estimate(speedup(*sides, first_stage=3, lower_is_better=False)).value == pytest.approx(3)
    assert estimate(speedup(*sides, first_stage=3)).value == pytest.approx(1 / 3)


def test_one_disturbed_pass_in_five_hardly_moves_a_round() -> None:
    reference, candidate = [[2.0, 2.02]] * 5, [[1.0, 1.01]] * 5
    disturbed = [[1.0, 1.01]] * 4 + [[9.0, 7.0]]
    assert round_log_ratio(reference, candidate) == pytest.approx(math.log(2))
    assert round_log_ratio(reference, disturbed) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ([[1.0]], [[1.0], [1.0]], "the same passes, got 1 and 2"),
        ([], [], "the same passes, got 0 and 0"),
        ([[1.0]], [[0.0]], "positive values, got"),
        ([[1.0]], [[]], "positive values, got"),
        ([[math.nan]], [[1.0]], "positive values, got"),
    ],
)
def test_a_round_that_is_none_is_refused(
    reference: list[list[float]], candidate: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        round_log_ratio(reference, candidate)


def test_sides_must_match_and_a_first_stage_must_have_two_rounds() -> None:
    sides = played([0.0, 0.1, 0.0])
    with pytest.raises(ValueError, match="the same rounds, got 3 and 2"):
        speedup(sides, sides[:2], first_stage=2)
    with pytest.raises(ValueError, match="first_stage must be at least 2 rounds, got 1 of 3"):
        speedup(sides, sides, first_stage=1)


@pytest.mark.parametrize(("count", "first"), [(0, 0), (1, 1), (1, 4)])
def test_fewer_than_two_rounds_give_no_speedup(count: int, first: int) -> None:
    found = speedup(played([0.0] * count), played([0.0] * count), first_stage=first)
    assert isinstance(found, Unknown) and f"at least 2 rounds, got {count}" in found.why


def test_a_first_stage_that_the_time_cut_short_is_an_ordinary_interval() -> None:
    sides = played([0.0, 0.1, -0.1]), played([0.0] * 3)
    assert speedup(*sides, first_stage=6) == speedup(*sides, first_stage=3)


def test_rounds_without_a_pass_are_left_out() -> None:
    sides = played([0.0, 0.1, -0.1]), played([0.0] * 3)
    found = rounds([*sides[0], []], [*sides[1], []], first_stage=4)
    assert found == rounds(*sides, first_stage=3)


def test_rounds_needed_reach_the_precision() -> None:
    first = [0.0, 0.02, -0.02, 0.01]
    wanted = rounds_needed(first, 0.01)
    more = [*first, *[0.0] * (wanted - 4)]
    found = estimate(speedup(played(more), played([0.0] * wanted), first_stage=4))
    fewer = estimate(speedup(played(more[:-1]), played([0.0] * (wanted - 1)), first_stage=4))
    assert wanted > 4 and math.sqrt(found.high / found.low) <= 1.01 < math.sqrt(fewer.high / fewer.low)
    assert rounds_needed([0.0, 0.001, 0.0], 0.1) == 3


@pytest.mark.parametrize(("logs", "precision"), [([0.1], 0.03), ([0.1, 0.2], 0.0)])
def test_rounds_needed_refuses_what_it_cannot_plan(logs: list[float], precision: float) -> None:
    with pytest.raises(ValueError, match=r"must (be|hold)"):
        rounds_needed(logs, precision)
