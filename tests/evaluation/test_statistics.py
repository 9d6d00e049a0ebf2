"""Intervals cover, tests keep their error rates, and what the data cannot support is not given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.evaluation.statistics import (
    ALPHA,
    Decision,
    Estimate,
    Unknown,
    accuracy,
    decide,
    holm,
    items_needed,
    mcnemar,
    median,
    non_inferiority_p,
    paired_difference,
    percentile,
    proportion,
    speedup,
)

SECONDS = st.floats(1e-4, 1e3)
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=40)


@settings(max_examples=30, deadline=None)
@given(st.lists(SECONDS, min_size=1, max_size=40))
def test_median_lies_in_its_interval_and_repeats(samples: list[float]) -> None:
    found = median(samples, resamples=200)
    assert found.low <= found.value <= found.high
    assert found == median(samples, resamples=200)
    assert min(samples) <= found.low and found.high <= max(samples)


def test_median_interval_covers_the_true_median() -> None:
    generator = np.random.default_rng(0)
    found = [median(generator.lognormal(0, 0.3, 24).tolist(), resamples=400) for _ in range(200)]
    assert sum(x.low <= 1 <= x.high for x in found) >= 180


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_median_refuses_what_is_no_sample(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="samples must"):
        median(bad)


@pytest.mark.parametrize(("percent", "needed"), [(50, 6), (90, 36), (99, 368)])
def test_percentile_is_given_only_from_enough_samples(percent: float, needed: int) -> None:
    few = percentile([1.0] * (needed - 1), percent)
    assert isinstance(few, Unknown) and f"at least {needed} samples, got {needed - 1}" in few.why
    assert isinstance(percentile([1.0] * needed, percent), Estimate)


@settings(max_examples=30, deadline=None)
@given(st.lists(SECONDS, min_size=36, max_size=80), st.sampled_from([10, 50, 90]))
def test_percentile_lies_in_its_interval(samples: list[float], percent: float) -> None:
    found = percentile(samples, percent)
    assert isinstance(found, Estimate) and found.low <= found.value <= found.high


def test_percentile_interval_covers_the_true_percentile() -> None:
    generator = np.random.default_rng(1)
    found = [percentile(generator.uniform(0, 1, 60).tolist(), 90) for _ in range(300)]
    assert sum(isinstance(x, Estimate) and x.low <= 0.9 <= x.high for x in found) >= 280


@pytest.mark.parametrize("percent", [0, 100, -5])
def test_percentile_must_lie_between_0_and_100(percent: float) -> None:
    with pytest.raises(ValueError, match="percent must be between 0 and 100"):
        percentile([1.0] * 40, percent)


def blocks(generator: np.random.Generator, scale: float, count: int = 4, between: float = 0.02) -> list[list[float]]:
    drift = generator.normal(0, between, (count, 1))
    return (scale * np.exp(drift + generator.normal(0, 0.03, (count, 16)))).tolist()


def test_speedup_interval_covers_the_true_ratio_although_blocks_drift() -> None:
    generator = np.random.default_rng(2)
    found = [speedup(blocks(generator, 2.0), blocks(generator, 1.0), resamples=400) for _ in range(150)]
    assert sum(isinstance(x, Estimate) and x.low <= 2 <= x.high for x in found) >= 138


def test_speedup_is_surer_from_more_blocks() -> None:
    generator = np.random.default_rng(3)
    few, many = (speedup(blocks(generator, 2.0, n), blocks(generator, 1.0, n)) for n in (2, 12))
    assert isinstance(few, Estimate) and isinstance(many, Estimate)
    assert many.high - many.low < (few.high - few.low) / 2


def test_speedup_turns_round_for_throughput() -> None:
    generator = np.random.default_rng(4)
    slow, fast = blocks(generator, 1.0), blocks(generator, 3.0)
    found = speedup(slow, fast, lower_is_better=False)
    assert isinstance(found, Estimate) and found.low > 2.5 and found.n == 128


def test_speedup_takes_blocks_of_unequal_length() -> None:
    found = speedup([[2.0] * 5, [2.0] * 3], [[1.0], [1.0] * 7])
    assert found == Estimate(2.0, 2.0, 2.0, 16)


def test_speedup_from_one_block_is_unknown() -> None:
    found = speedup([[1.0, 1.1]], [[0.5], [0.6]])
    assert isinstance(found, Unknown) and "at least 2 blocks" in found.why


def test_accuracy_never_claims_certainty() -> None:
    found = accuracy([1.0] * 20)
    assert found.value == 1.0 and 0.8 < found.low < 0.9 and found.high == pytest.approx(1.0)
    assert accuracy([1, 0, 0, 0]) == proportion(1, 4)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_proportion_must_be_possible(right: float, n: int) -> None:
    with pytest.raises(ValueError, match="right must be between 0 and n"):
        proportion(right, n)


@settings(max_examples=40, deadline=None)
@given(ANSWERS)
def test_paired_difference_turns_its_sign_when_the_sides_are_swapped(answers: list[tuple[bool, bool, int]]) -> None:
    first, second, clusters = ([float(row[i]) for row in answers] for i in range(3))
    forth = paired_difference(first, second, clusters, resamples=200)
    back = paired_difference(second, first, clusters, resamples=200)
    assert forth.points.value == pytest.approx(-back.points.value)
    assert forth.standard_error == pytest.approx(back.standard_error)
    assert forth.points.low <= forth.points.value <= forth.points.high
    assert forth.clusters == len(set(clusters)) and 1 <= forth.effective_n <= len(answers) + 1e-9


def test_paired_difference_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="equally long, got 2, 1, 2"):
        paired_difference([1, 0], [1], ["a", "b"])


def flipped(generator: np.random.Generator, lost: float, gained: float, items: int, size: int = 1) -> list[np.ndarray]:
    """(candidate, reference, clusters): whole clusters flip together."""
    draw = generator.random(items // size).repeat(size)
    reference = (np.arange(items) // size % 2).astype(float)
    candidate = np.where(draw < lost, 0.0, np.where(draw < lost + gained, 1.0, reference))
    reference = np.where(draw < lost, 1.0, np.where(draw < lost + gained, 0.0, reference))
    return [candidate, reference, np.arange(items) // size]


@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_of_exactly_the_margin_rarely_passes_and_its_interval_covers(size: int) -> None:
    generator = np.random.default_rng(5)
    passed = covered = 0
    for _ in range(400):
        candidate, reference, clusters = flipped(generator, 0.06, 0.04, 800, size)
        found = paired_difference(candidate.tolist(), reference.tolist(), clusters.tolist(), resamples=300)
        passed += non_inferiority_p(found, 2.0) < ALPHA
        covered += found.points.low <= -2.0 <= found.points.high
    assert passed <= 22  # expected 10
    assert covered >= 366  # expected 380


def test_ignoring_clusters_would_overstate_certainty() -> None:
    candidate, reference, clusters = flipped(np.random.default_rng(6), 0.06, 0.04, 800, 8)
    honest = paired_difference(candidate.tolist(), reference.tolist(), clusters.tolist())
    naive = paired_difference(candidate.tolist(), reference.tolist(), list(range(800)))
    assert honest.points.high - honest.points.low > 1.8 * (naive.points.high - naive.points.low)


def test_no_flips_in_few_items_prove_nothing_but_in_many_they_do() -> None:
    few, many = (paired_difference([1.0] * n, [1.0] * n, list(range(n))) for n in (60, 2000))
    assert decide(few, 2.0, non_inferiority_p(few, 2.0)) is Decision.undecided
    assert decide(many, 2.0, non_inferiority_p(many, 2.0)) is Decision.non_inferior
    assert few.points.low < 0 < few.points.high


def test_one_cluster_proves_nothing() -> None:
    found = paired_difference([1.0] * 500, [1.0] * 500, ["same"] * 500)
    assert non_inferiority_p(found, 2.0) == 1.0


def test_a_loss_far_beyond_the_margin_is_inferior() -> None:
    found = paired_difference([0.0] * 200 + [1.0] * 800, [1.0] * 1000, list(range(1000)))
    assert found.points.value == pytest.approx(-20)
    assert decide(found, 2.0, non_inferiority_p(found, 2.0)) is Decision.inferior


def test_items_needed_would_indeed_decide() -> None:
    generator = np.random.default_rng(7)
    candidate, reference, clusters = flipped(generator, 0.05, 0.05, 300)
    found = paired_difference(candidate.tolist(), reference.tolist(), clusters.tolist())
    assert decide(found, 2.0, non_inferiority_p(found, 2.0)) is Decision.undecided
    more = items_needed(found, 2.0)
    assert more is not None
    n = 300 + more
    loss = -found.points.value / 100
    decided = 0
    for _ in range(60):
        candidate, reference, clusters = flipped(generator, 0.05 + loss / 2, 0.05 - loss / 2, n)
        again = paired_difference(candidate.tolist(), reference.tolist(), clusters.tolist(), resamples=50)
        decided += non_inferiority_p(again, 2.0) < ALPHA
    assert decided >= 36  # 48 expected at 80% power


def test_items_needed_grows_with_the_number_of_tests_and_is_none_on_the_margin() -> None:
    found = paired_difference([0.0, 1.0] * 50, [1.0, 0.0] * 50, list(range(100)))
    one, five = items_needed(found, 2.0), items_needed(found, 2.0, tests=5)
    assert one is not None and five is not None and five > one
    on_margin = paired_difference([0.0] * 2 + [1.0] * 98, [1.0] * 100, list(range(100)))
    assert items_needed(on_margin, 2.0) is None


def test_mcnemar_counts_flips_exactly() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(3, 9) == mcnemar(9, 3)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_only_raises_p_values_and_keeps_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    ranks = sorted(range(len(p_values)), key=lambda i: (p_values[i], adjusted[i]))
    assert [adjusted[i] for i in ranks] == sorted(adjusted)


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03], [0.2, 0.2, 0.001, 0.9], [0.5]])
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())
