"""How many more items would decide: an undecided verdict that says what it would take.

Suppose the differences that were found are the true ones. A study of f times as many items has standard errors
smaller by the root of f; it decides if every margin is kept (all tests pass, each with its own noise) or if some
difference lies surely beyond its margin. f is sought such that this happens in `POWER` = 80% of such studies. Under
the hypothesis and under what was found the standard error is not the same (Lachin 1981), and pooled and languages
share their items, so that their tests pass or fail together: the chance is counted over simulated studies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hasten.evaluation.difference import Difference, null_error
from hasten.evaluation.statistics import ALPHA

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

POWER = 0.8
"""Chance to reach a decision that `items_needed` plans for."""
STUDIES = 4000
LARGEST = 2.0**24
"""A study this many times larger is no advice; the difference sits on the margin."""


def power(
    pooled: Difference,
    margin_points: float,
    growth: float,
    *,
    languages: Mapping[str, Difference] | None = None,
    language_margin_points: float = 0.0,
    tests: int = 1,
) -> float:
    """The chance, 0 to 1, that a new study of growth times the items decides, if the differences are the true ones.

    languages: differences that must each keep their own margin too. tests: variants that Holm's correction still
    counts (it divides `ALPHA` by it).
    """
    parts = [(pooled, margin_points), *((part, language_margin_points) for part in (languages or {}).values())]
    return _decided(parts, _drawn([part for part, _ in parts]), growth, tests)


def items_needed(
    pooled: Difference,
    margin_points: float,
    *,
    languages: Mapping[str, Difference] | None = None,
    language_margin_points: float = 0.0,
    tests: int = 1,
) -> int | None:
    """About how many more items, in the same mix of languages and clusters, decide with `POWER`.

    Arguments as in `power`. Rounded up to two digits. None if no number of items decides: a difference sits on its
    margin, or there is one cluster only.
    """
    parts = [(pooled, margin_points), *((part, language_margin_points) for part in (languages or {}).values())]
    if any(part.clusters < 2 for part, _ in parts):
        return None
    drawn = _drawn([part for part, _ in parts])
    high = 1.0
    while _decided(parts, drawn, high, tests) < POWER:
        high *= 2
        if high > LARGEST:
            return None
    low = high / 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _decided(parts, drawn, middle, tests) >= POWER else (middle, high)
    n = pooled.points.n
    return round_up(max(math.ceil((high - 1) * n), 1))


def round_up(number: int) -> int:
    """To two digits, never down: it is an estimate."""
    step = int(10 ** max(math.floor(math.log10(number)) - 1, 0))
    return math.ceil(number / step) * step


def _drawn(differences: list[Difference]) -> Floats:
    """Deviations of the differences in studies as large as this one, points, (STUDIES, parts); the pooled one first.

    Languages are independent, and the pooled deviation is their mean, weighted by items.
    """
    import numpy as np

    errors = np.array([_own_error(difference) for difference in differences])
    # Antithetic halves: the middle of the sample is exactly the truth.
    half = np.random.default_rng(0).standard_normal((STUDIES // 2, len(differences)))
    normal = np.concatenate([half, -half])
    if len(differences) > 1:
        shares = np.array([difference.points.n for difference in differences[1:]]) * errors[1:]
        normal[:, 0] = normal[:, 1:] @ (shares / np.linalg.norm(shares))
    deviations: Floats = normal * errors
    return deviations


def _own_error(difference: Difference) -> float:
    """The standard error in points, with the flips that `paired_difference` adds: none seen is not none to come."""
    n, flip = difference.points.n, difference.design_effect
    return math.sqrt((difference.standard_error * n) ** 2 + (100 * flip) ** 2) / (n + flip)


def _decided(parts: list[tuple[Difference, float]], drawn: Floats, growth: float, tests: int) -> float:
    import numpy as np
    from scipy.stats import t

    passed = np.ones(len(drawn), dtype=bool)
    beyond = np.zeros(len(drawn), dtype=bool)
    for column, (difference, margin) in zip(drawn.T, parts, strict=True):
        freedom = difference.degrees_of_freedom * growth
        found = difference.points.value + column / math.sqrt(growth)
        needed = t.isf(ALPHA / tests, freedom) * null_error(difference, margin) / math.sqrt(growth)
        passed &= found + margin > needed
        beyond |= found + margin < -t.isf(ALPHA, freedom) * _own_error(difference) / math.sqrt(growth)
    return float((passed | beyond).mean())
