"""The statistics behind a verdict: how sure we are of a speed, an accuracy, a difference.

A number without an interval decides nothing. Speeds on a shared machine drift, so a ratio is resampled by
blocks; answers to related questions are not independent, so accuracy is resampled by clusters; and a variant
is *non-inferior* only if the data rule out a loss beyond a margin that was declared beforehand: "no difference
was found" is not evidence. What the data cannot support is an `Unknown` with its reason, never a number.

Every function takes plain sequences and is deterministic (seeded). Intervals cover 95%; tests are
one-sided at `ALPHA` = 2.5%, so "non-inferior" and "the interval excludes the margin" say the same thing.

    PYTHONPATH=src python -c "from hasten.evaluation.statistics import accuracy; print(accuracy([1, 1, 0, 1]))"
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float64]]

ALPHA = 0.025
"""One-sided error of the non-inferiority test: the lower tail of a two-sided 95% interval."""
POWER = 0.8
"""Chance to reach a decision that `items_needed` plans for."""
RESAMPLES = 4000


class Decision(Enum):
    """What the data say about a loss of accuracy beyond the margin."""

    non_inferior = "non-inferior"
    inferior = "inferior"
    undecided = "undecided"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval, from n observations."""

    value: float
    low: float
    high: float
    n: int

    @property
    def ci95(self) -> list[float]:
        return [self.low, self.high]


@dataclass(frozen=True)
class Unknown:
    """A quantity that the data cannot support, and why."""

    why: str
    n: int


@dataclass(frozen=True)
class Difference:
    """A paired difference in accuracy, in points (hundredths).

    points: candidate minus reference, with its cluster-bootstrap interval. standard_error: cluster-robust, points.
    effective_n: the number of independent items worth as much as these clusters (Kish).
    """

    points: Estimate
    standard_error: float
    clusters: int
    effective_n: float


def median(samples: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The median with a percentile-bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Below 6 samples no 95% interval exists: the range is given, which covers 1 - 2^(1 - n).
    Raises `ValueError` if there are no samples.
    """
    import numpy as np

    values = _finite(samples)
    n = len(values)
    if n < 6:
        return Estimate(float(np.median(values)), float(values.min()), float(values.max()), n)
    draws = np.median(values[np.random.default_rng(seed).integers(0, n, (resamples, n))], axis=1)
    low, high = np.quantile(draws, [ALPHA, 1 - ALPHA])
    return Estimate(float(np.median(values)), float(low), float(high), n)


def percentile(samples: Sequence[float], percent: float) -> Estimate | Unknown:
    """A percentile with its distribution-free interval from order statistics (Hahn and Meeker 1991, chapter 5).

    `Unknown` if no 95% interval exists, that is if the samples are too few to bound the percentile: p50 needs 6,
    p90 36, p99 368. Raises `ValueError` unless 0 < percent < 100.
    """
    import numpy as np
    from scipy.stats import binom

    if not 0 < percent < 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent}")
    quantile = percent / 100
    needed = math.ceil(math.log(ALPHA) / math.log(max(quantile, 1 - quantile)))
    if len(samples) < needed:
        return Unknown(f"p{percent:g} needs at least {needed} samples, got {len(samples)}", len(samples))
    values = np.sort(_finite(samples))
    n = len(values)
    # P(the k smallest lie below the percentile) is binomial: ranks (1-based) with at most ALPHA in each tail.
    low, high = max(int(binom.ppf(ALPHA, n, quantile)), 1), min(int(binom.ppf(1 - ALPHA, n, quantile)) + 1, n)
    return Estimate(float(np.quantile(values, quantile)), float(values[low - 1]), float(values[high - 1]), n)


def speedup(
    reference: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    *,
    lower_is_better: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate | Unknown:
    """How many times faster the candidate is: the ratio of medians, with an interval that knows blocks drift.

    reference, candidate: one sequence of samples per block (a block is one fresh process of an ABBA series).
    Two-stage bootstrap (Davison and Hinkley 1997, section 3.8): blocks are resampled, then samples in each block.
    Few blocks make a plain percentile interval too short, so its tails are widened as a t-interval's would be
    (Hesterberg 2015, "expanded percentile"). `Unknown` if a side has fewer than 2 blocks: drift is then invisible.
    """
    import numpy as np
    from scipy.stats import norm, t

    n = sum(map(len, reference)) + sum(map(len, candidate))
    fewest = min(len(reference), len(candidate))
    if fewest < 2:
        return Unknown(f"a speed-up needs at least 2 blocks on each side, got {fewest}", n)
    generator = np.random.default_rng(seed)
    sides = [reference, candidate] if lower_is_better else [candidate, reference]
    above, below = (_block_medians(side, generator, resamples) for side in sides)
    value = np.median(np.concatenate(sides[0])) / np.median(np.concatenate(sides[1]))
    widening = t.ppf(1 - ALPHA, len(reference) + len(candidate) - 2) * math.sqrt(fewest / (fewest - 1))
    tail = norm.sf(widening)
    low, high = np.quantile(above / below, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), n)


def accuracy(scores: Sequence[float]) -> Estimate:
    """The share of right answers with Wilson's interval (Wilson 1927), both from 0 to 1.

    scores: 1.0 right, 0.0 wrong, or in between. Raises `ValueError` if there are none.
    """
    values = _finite(scores)
    return proportion(float(values.sum()), len(values))


def proportion(right: float, n: int) -> Estimate:
    """`accuracy` from the number of right answers among n. Raises `ValueError` unless 0 <= right <= n and n > 0."""
    from statsmodels.stats.proportion import proportion_confint

    if not (n > 0 and 0 <= right <= n):
        raise ValueError(f"right must be between 0 and n, and n above 0, got {right} of {n}")
    low, high = proportion_confint(right, n, alpha=2 * ALPHA, method="wilson")
    return Estimate(right / n, float(low), float(high), n)


def paired_difference(
    candidate: Sequence[float],
    reference: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Candidate minus reference on the same items, with an interval from resampling whole clusters.

    candidate, reference: scores of the same items in the same order; clusters: items that are not independent
    share one. Half a gained and half a lost item are added while resampling (Agresti and Min 2005), so that
    few or no flips do not make the interval collapse. Raises `ValueError` if lengths differ or there are no items.
    """
    import numpy as np

    if not len(candidate) == len(reference) == len(clusters):
        raise ValueError(
            f"candidate, reference and clusters must be equally long, got {len(candidate)}, {len(reference)}, "
            f"{len(clusters)}"
        )
    change = _finite(candidate) - _finite(reference)
    index: dict[Hashable, int] = {}
    member = np.array([index.setdefault(cluster, len(index)) for cluster in clusters])
    sums, sizes = np.bincount(member, change), np.bincount(member).astype(float)
    n, count = len(change), len(sizes)
    mean = float(change.mean())
    variance = float(((sums - mean * sizes) ** 2).sum()) * count / max(count - 1, 1) / n**2

    # Clusters with equal (sum, size) are interchangeable, so drawing them is one small multinomial.
    kinds, weights = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    kinds = np.concatenate([kinds, [[1.0, 1.0], [-1.0, 1.0]]])
    weights = np.concatenate([weights, [0.5, 0.5]])
    drawn = np.random.default_rng(seed).multinomial(count, weights / weights.sum(), size=resamples) @ kinds
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [ALPHA, 1 - ALPHA])
    points = Estimate(100 * mean, 100 * min(float(low), mean), 100 * max(float(high), mean), n)
    return Difference(points, 100 * math.sqrt(variance), count, n**2 / float((sizes**2).sum()))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that gained and lost answers are equally likely (McNemar 1947)."""
    from statsmodels.stats.contingency_tables import mcnemar as exact

    return min(1.0, float(exact([[0, gained], [lost, 0]], exact=True).pvalue))


def non_inferiority_p(difference: Difference, margin_points: float) -> float:
    """One-sided p-value of "the candidate loses at least `margin_points`"; small means non-inferior.

    A cluster-robust t-test. The variance is at least what a true loss of the margin implies (margin x (1 - margin)
    per item, as in the score test of Tango 1998), so that no flips in few items prove nothing.
    """
    from scipy.stats import t

    if difference.clusters < 2:
        return 1.0
    error = _null_error(difference, margin_points)
    return float(t.sf((difference.points.value + margin_points) / error, difference.clusters - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several variants at once (Holm 1979): the smallest times their number, the next
    times one less, and so on, never falling."""
    adjusted, floor = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        adjusted[index] = floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
    return adjusted


def decide(difference: Difference, margin_points: float, p_value: float) -> Decision:
    """Non-inferior if `p_value` (adjusted where several are tested) is below `ALPHA`; inferior if the whole
    interval lies beyond the margin; otherwise the data leave it undecided."""
    if p_value < ALPHA:
        return Decision.non_inferior
    return Decision.inferior if difference.points.high < -margin_points else Decision.undecided


def items_needed(difference: Difference, margin_points: float, *, tests: int = 1) -> int | None:
    """About how many more items would decide, one way or the other, with `POWER`, if the difference stays.

    tests: variants tested at once (Holm's first step divides `ALPHA` by it). Rounded to two digits. None if the
    difference sits on the margin, where no number of items decides.
    """
    from scipy.stats import norm

    distance = abs(difference.points.value + margin_points)
    if distance < 1e-9:
        return None
    n = difference.points.n
    variance = n * _null_error(difference, margin_points) ** 2
    total = variance * (float(norm.isf(ALPHA / tests) + norm.isf(1 - POWER)) / distance) ** 2
    more = max(math.ceil(total) - n, 1)
    step = int(10 ** max(math.floor(math.log10(more)) - 1, 0))
    return math.ceil(more / step) * step


def _null_error(difference: Difference, margin_points: float) -> float:
    """The standard error in points, but no less than a true loss of the margin would give."""
    margin = min(margin_points / 100, 0.5)
    return max(difference.standard_error, 100 * math.sqrt(margin * (1 - margin) / difference.effective_n))


def _finite(samples: Sequence[float]) -> Floats:
    import numpy as np

    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("samples must hold at least one number, got none")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got NaN or infinity")
    return values


def _block_medians(blocks: Sequence[Sequence[float]], generator: np.random.Generator, resamples: int) -> Floats:
    """Medians of resampled blocks of resampled values, (resamples,)."""
    import numpy as np

    lengths = np.array([len(_finite(block)) for block in blocks])
    table = np.zeros((len(blocks), lengths.max()))  # (blocks, longest), padded
    for row, block in zip(table, blocks, strict=True):
        row[: len(block)] = block
    chosen = generator.integers(0, len(blocks), (resamples, len(blocks)))  # (R, blocks)
    size = lengths[chosen][..., None]  # (R, blocks, 1)
    picks = (generator.random((*chosen.shape, table.shape[1])) * size).astype(np.int64)
    values = table[chosen[..., None], picks]  # (R, blocks, longest)
    ragged = bool((lengths != lengths[0]).any())
    if ragged:
        values[np.arange(table.shape[1]) >= size] = np.nan  # a short block gives no more samples than it holds
    medians: Floats = (np.nanmedian if ragged else np.median)(values.reshape(resamples, -1), axis=1)
    return medians
