"""Medians, percentiles and accuracies: what is known, how surely, and what the data cannot support."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.evaluation.statistics import (
    Estimate,
    Unknown,
    accuracy,
    clustered_mean,
    median,
    percentile,
    proportion,
)

SECONDS = st.floats(1e-4, 1e3)


@settings(max_examples=30, deadline=None)
@given(st.lists(SECONDS, min_size=2, max_size=40))
def test_median_lies_in_its_interval_and_repeats(samples: list[float]) -> None:
    found = median(samples)
    assert isinstance(found, Estimate) and found.low <= found.value <= found.high
    assert found.value == np.median(samples) and found == median(samples[::-1])
    if len(samples) >= 6:
        assert min(samples) <= found.low and found.high <= max(samples)


def test_few_samples_have_a_wide_median_and_one_has_none() -> None:
    two, five = median([1.0, 1.1]), median([1.0, 1.1, 1.02, 1.05, 1.07])
    assert isinstance(two, Estimate) and two.high / two.low > 2
    assert isinstance(five, Estimate) and 1.02 < five.high / five.low < 1.3
    assert isinstance(median([-1.0, 0.0, 2.0]), Estimate)
    one = median([1.0])
    assert isinstance(one, Unknown) and "at least 2 samples, got 1" in one.why


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


def test_percentile_interval_lies_within_that_of_whole_ranks_and_mirrors() -> None:
    samples = np.sort(np.random.default_rng(0).normal(0, 1, 60))
    found, mirrored = percentile(samples.tolist(), 90), percentile((-samples).tolist(), 10)
    assert isinstance(found, Estimate) and isinstance(mirrored, Estimate)
    # Binomial ranks with at most 2.5% in each tail: 49 and 59 of 60 (Hahn and Meeker 1991).
    assert samples[48] <= found.low <= samples[49] and samples[57] <= found.high <= samples[58]
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("percent", [0, 100, -5])
def test_percentile_must_lie_between_0_and_100(percent: float) -> None:
    with pytest.raises(ValueError, match="percent must be between 0 and 100"):
        percentile([1.0] * 40, percent)


def test_accuracy_never_claims_certainty() -> None:
    found = accuracy([1.0] * 20)
    assert found.value == 1.0 and 0.8 < found.low < 0.9 and found.high == pytest.approx(1.0)
    assert accuracy([1, 0, 0, 0]) == proportion(1, 4)


def test_accuracy_counts_conversations_not_turns() -> None:
    scores = np.repeat(np.random.default_rng(0).random(60) < 0.7, 5).astype(float).tolist()
    apart, together = accuracy(scores), accuracy(scores, [i // 5 for i in range(300)])
    one_each = accuracy(scores[::5])
    assert together.value == apart.value and together.n == 300
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert together.high - together.low == pytest.approx(one_each.high - one_each.low, rel=0.05)


def test_clusters_of_which_all_answers_are_right_count_as_one_item_each() -> None:
    assert accuracy([1.0] * 30, [i // 3 for i in range(30)]).low == pytest.approx(accuracy([1.0] * 10).low)
    assert accuracy([1.0, 0.0] * 10, ["one"] * 20).high - accuracy([1.0, 0.0] * 10, ["one"] * 20).low > 0.8


def test_what_differs_between_tasks_is_no_uncertainty() -> None:
    scores = [1.0] * 90 + [0.0] * 10 + [1.0] * 10 + [0.0] * 90
    apart, pooled = accuracy(scores, strata=["a"] * 100 + ["b"] * 100), accuracy(scores)
    assert apart.value == pooled.value == 0.5
    assert apart.high - apart.low == pytest.approx(0.6 * (pooled.high - pooled.low), rel=0.05)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_proportion_must_be_possible(right: float, n: int) -> None:
    with pytest.raises(ValueError, match="right must be between 0 and n"):
        proportion(right, n)


def test_clustered_mean_of_independent_items_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(0, 1, 50)
    found = clustered_mean(values.tolist(), range(50))
    assert found.variance == pytest.approx(values.var(ddof=1) / 50)
    assert found.degrees_of_freedom == pytest.approx(49) and found.design_effect == 1


def test_clustered_mean_equals_the_regression_on_a_constant() -> None:
    """statsmodels' cluster covariance, but for the small-sample factor, where clusters are equal."""
    import statsmodels.api as sm

    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(20), 4)
    values = generator.normal(0, 1, 80) + generator.normal(0, 1, 20)[clusters]
    fit = sm.OLS(values, np.ones(80)).fit(cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False})
    found = clustered_mean(values.tolist(), clusters.tolist())
    assert found.variance == pytest.approx(float(fit.cov_params()[0, 0]) * 20 / 19)
    assert found.degrees_of_freedom == pytest.approx(19) and 0.3 < found.icc < 0.8


def test_few_uneven_clusters_leave_few_degrees_of_freedom() -> None:
    clusters = [0] * 40 + list(range(1, 21))
    values = [float(i % 3) for i in clusters]
    found = clustered_mean(values, clusters)
    assert found.degrees_of_freedom < 5 and found.n == 60 and found.typical_size == pytest.approx(1620 / 60)


@pytest.mark.parametrize(("clusters", "strata"), [([1], None), ([1, 2], [1])])
def test_clustered_mean_refuses_unequal_lengths(clusters: list[int], strata: list[int] | None) -> None:
    with pytest.raises(ValueError, match="must be equally long, got 2"):
        clustered_mean([1.0, 0.0], clusters, strata)
