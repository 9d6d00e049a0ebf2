"""Paired differences: few flips, clusters, margins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.evaluation.difference import (
    Difference,
    decide,
    holm,
    mcnemar,
    non_inferiority_p,
    null_error,
    paired_difference,
)
from hasten.evaluation.statistics import ALPHA, Decision

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40)


def flipped(items: int, lost: int, gained: int = 0, size: int = 1) -> Difference:
    """The first items lost, the next gained; neighbours share a cluster."""
    reference = [1.0] * lost + [0.0] * gained + [1.0] * (items - lost - gained)
    candidate = [0.0] * lost + [1.0] * gained + [1.0] * (items - lost - gained)
    return paired_difference(candidate, reference, [i // size for i in range(items)])


@settings(max_examples=40, deadline=None)
@given(ANSWERS)
def test_paired_difference_turns_its_sign_when_the_sides_are_swapped(answers: list[tuple[bool, bool, int]]) -> None:
    first, second, clusters = ([float(row[i]) for row in answers] for i in range(3))
    forth = paired_difference(first, second, clusters, resamples=200)
    back = paired_difference(second, first, clusters, resamples=200)
    assert forth.points.value == pytest.approx(-back.points.value)
    assert forth.standard_error == pytest.approx(back.standard_error)
    assert (forth.gained, forth.lost) == (back.lost, back.gained)
    assert forth.points.low <= forth.points.value <= forth.points.high
    assert forth.clusters == len(set(clusters)) and 1 <= forth.effective_n <= len(answers) + 1e-9
    assert 1 <= forth.design_effect <= len(answers) / forth.effective_n + 1e-9


def test_paired_difference_repeats_and_follows_its_seed() -> None:
    assert flipped(300, 9, 5) == flipped(300, 9, 5)
    other = paired_difference([0.0] * 9 + [1.0] * 291, [1.0] * 300, list(range(300)), seed=1)
    assert other.points.value == flipped(300, 9).points.value


def test_paired_difference_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="equally long, got 2, 1, 2"):
        paired_difference([1, 0], [1], ["a", "b"])


def test_ignoring_clusters_would_overstate_certainty() -> None:
    honest, naive = flipped(800, 48, 32, size=8), flipped(800, 48, 32)
    assert honest.points.high - honest.points.low > 1.8 * (naive.points.high - naive.points.low)
    assert honest.design_effect == pytest.approx(8, rel=0.05)
    assert non_inferiority_p(honest, 4.0) > non_inferiority_p(naive, 4.0)


@pytest.mark.parametrize("flips", [0, 1, 2])
def test_few_flips_never_make_the_interval_collapse(flips: int) -> None:
    found = flipped(300, flips)
    assert found.points.low < -100 * flips / 300 and found.points.high >= 0
    assert 1.0 < found.points.high - found.points.low < 4.0


def test_no_flips_in_few_items_prove_nothing_but_in_many_they_do() -> None:
    few, many = flipped(60, 0), flipped(2000, 0)
    assert decide(few, 2.0, non_inferiority_p(few, 2.0)) is Decision.undecided
    assert decide(many, 2.0, non_inferiority_p(many, 2.0)) is Decision.non_inferior
    assert few.points.low < 0 < few.points.high


def test_no_flips_in_few_conversations_prove_nothing() -> None:
    assert non_inferiority_p(flipped(600, 0), 2.0) < ALPHA < non_inferiority_p(flipped(600, 0, size=20), 2.0)


def test_one_cluster_proves_nothing() -> None:
    found = paired_difference([1.0] * 500, [1.0] * 500, ["same"] * 500)
    assert non_inferiority_p(found, 2.0) == 1.0
    assert (found.points.low, found.points.high) == (-100, 100)


def test_a_loss_far_beyond_the_margin_is_inferior() -> None:
    found = flipped(1000, 200)
    assert found.points.value == pytest.approx(-20)
    assert decide(found, 2.0, non_inferiority_p(found, 2.0)) is Decision.inferior


def test_null_error_without_clusters_is_at_least_tangos() -> None:
    """Against the restricted maximum likelihood found by brute force."""
    found, n, margin = flipped(200, 1, 2), 200, 0.02
    lost = np.linspace(margin, 0.3, 200_001)
    gained = lost - margin
    with np.errstate(divide="ignore"):
        likelihood = np.log(lost) + 2 * np.log(gained) + (n - 3) * np.log(1 - lost - gained)
    best = int(likelihood.argmax())
    variance = (lost[best] + gained[best] - margin**2) / n
    assert null_error(found, 2.0) == pytest.approx(100 * variance**0.5, rel=1e-3)
    assert null_error(found, 2.0) > found.standard_error


def test_mcnemar_counts_flips_exactly() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(3, 9) == mcnemar(9, 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_only_raises_p_values_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    ranks = sorted(range(len(p_values)), key=lambda i: (p_values[i], adjusted[i]))
    assert [adjusted[i] for i in ranks] == sorted(adjusted)


def test_holm_multiplies_the_smallest_by_their_number() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
