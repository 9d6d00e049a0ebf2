"""How many more items: enough to decide, no more than that."""

from __future__ import annotations

import pytest

from hasten.evaluation.difference import Difference, paired_difference
from hasten.evaluation.power import POWER, items_needed, power, round_up


def flipped(items: int, lost: int, gained: int, size: int = 1) -> Difference:
    reference = [1.0] * lost + [0.0] * gained + [1.0] * (items - lost - gained)
    candidate = [0.0] * lost + [1.0] * gained + [1.0] * (items - lost - gained)
    return paired_difference(candidate, reference, [i // size for i in range(items)])


@pytest.mark.parametrize("found", [flipped(300, 15, 15), flipped(300, 24, 9), flipped(400, 24, 24, size=4)])
def test_the_advice_has_the_power_it_plans_for(found: Difference) -> None:
    more = items_needed(found, 2.0)
    assert more is not None
    n = found.points.n
    assert POWER <= power(found, 2.0, 1 + more / n) < POWER + 0.06
    assert power(found, 2.0, 1 + 0.8 * more / n) < POWER


def test_without_clusters_it_is_the_textbooks_sample_size() -> None:
    """n = (z + z)^2 variance / distance^2, where flips are many and the difference is none."""
    from scipy.stats import norm

    more = items_needed(flipped(1000, 100, 100), 2.0)
    assert more is not None
    textbook = (norm.isf(0.025) + norm.isf(0.2)) ** 2 * 0.2 / 0.02**2
    assert 1000 + more == pytest.approx(textbook, rel=0.06)


def test_items_needed_grows_with_tests_and_clusters_and_is_none_on_the_margin() -> None:
    found = flipped(300, 15, 15)
    one, three = items_needed(found, 2.0), items_needed(found, 2.0, tests=3)
    clustered = items_needed(flipped(300, 15, 15, size=5), 2.0)
    assert one is not None and three is not None and clustered is not None
    assert three > 1.2 * one and clustered > 3 * one
    assert items_needed(flipped(300, 6, 0), 2.0) is None
    assert items_needed(paired_difference([1.0] * 50, [1.0] * 50, ["one"] * 50), 2.0) is None


def test_a_difference_beyond_the_margin_needs_items_to_be_inferior() -> None:
    near, far = (items_needed(flipped(300, lost, 0), 2.0) for lost in (9, 12))
    assert near is not None and far is not None and far < near


def test_every_language_must_pass_in_the_same_study() -> None:
    english, chinese, pooled = flipped(300, 15, 15), flipped(300, 15, 15), flipped(600, 30, 30)
    margins = {"languages": {"en": english, "zh": chinese}, "language_margin_points": 3.0}
    alone, together = items_needed(pooled, 2.0), items_needed(pooled, 2.0, **margins)
    assert alone is not None and together is not None and together > alone
    assert power(pooled, 2.0, 1.0, **margins) < power(pooled, 2.0, 1.0)


@pytest.mark.parametrize(("number", "rounded"), [(1, 1), (99, 99), (101, 110), (1234, 1300), (120_000, 120_000)])
def test_advice_is_rounded_up_to_two_digits(number: int, rounded: int) -> None:
    assert round_up(number) == rounded
