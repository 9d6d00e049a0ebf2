"""How sure we are of a number: medians, percentiles and accuracies with intervals that cover what they promise.

A number without an interval decides nothing. Samples of a latency have no known distribution, so its percentiles
are bounded by ranks; answers of one conversation are not independent, so an accuracy counts its conversations, not
its items. What the data cannot support is an `Unknown` with its reason, never a number. Differences between two
trials are in `difference`, ratios of speeds in `speedup`, and how many more items would decide in `power`.

Every function takes plain sequences and gives the same answer every time. Intervals are meant to cover 95%;
`benchmarks/coverage.py` checks by simulation that they do, `docs/measuring.md` holds the table.

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
"""Error of every one-sided statement: one tail of a two-sided 95% interval."""


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


def median(samples: Sequence[float]) -> Estimate | Unknown:
    """The median with its 95% interval, as `percentile` gives it.

    From 2 to 5 samples, where ranks give no 95% interval, Student's interval of the mean logarithm stands in: right if
    the samples are log-normal (latencies roughly are), and wide, as it should be. Samples that are not all positive
    are taken as normal instead. One sample gives `Unknown`. Raises `ValueError` if there are none.
    """
    import numpy as np
    from scipy.stats import t

    values = np.sort(_finite(samples))
    n = len(values)
    if n < 2:
        return Unknown("a median with its interval needs at least 2 samples, got 1", n)
    if n >= _needed(0.5):
        return percentile(samples, 50)
    positive = bool((values > 0).all())
    scale = np.log(values) if positive else values
    reach = t.isf(ALPHA, n - 1) * scale.std(ddof=1) / math.sqrt(n)
    low, high = scale.mean() - reach, scale.mean() + reach
    value = float(np.median(values))
    # The median of equal or nearly equal samples may lie a rounding error outside.
    low, high = (math.exp(low), math.exp(high)) if positive else (low, high)
    return Estimate(value, min(float(low), value), max(float(high), value), n)


def percentile(samples: Sequence[float], percent: float) -> Estimate | Unknown:
    """A percentile with its distribution-free 95% interval between two ranks (Hahn and Meeker 1991, chapter 5).

    Whole ranks cover more than they promise, up to 98% for 40 samples, so each end is interpolated between two of them
    (Nyblom 1992, which for the median is Hettmansperger and Sheather 1986). `Unknown` if no 95% interval exists, that
    is if the samples are too few to bound the percentile: p50 needs 6, p90 36, p99 368. Raises `ValueError` unless
    0 < percent < 100.
    """
    import numpy as np

    if not 0 < percent < 100:
        raise ValueError(f"percent must be between 0 and 100, got {percent}")
    quantile = percent / 100
    values = np.sort(_finite(samples))
    n, needed = len(values), _needed(quantile)
    if n < needed:
        return Unknown(f"p{percent:g} needs at least {needed} samples, got {n}", n)
    value = float(np.quantile(values, quantile))
    low, high = _lower_limit(values, quantile), -_lower_limit(-values[::-1], 1 - quantile)
    return Estimate(value, min(low, value), max(high, value), n)


def accuracy(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, strata: Sequence[Hashable] | None = None
) -> Estimate:
    """The share of right answers with its 95% interval, all from 0 to 1.

    scores: 1.0 right, 0.0 wrong, or in between. clusters: items that are not independent share one; None: all are
    independent. strata: items drawn apart from others, such as a task's, share one; None: all were drawn together.
    Independent items have Wilson's interval (1927). Otherwise it is Wilson's for the number of independent items that
    would be as uncertain (Dean and Pagano 2015, after Korn and Graubard 1998): variance within strata, cluster-robust,
    and a factor (z / t)^2 for having estimated it. If all answers are right (or wrong), nothing tells how alike a
    cluster's answers are, and they are taken as one. Raises `ValueError` if there are no scores or the lengths differ.
    """
    from scipy.stats import norm, t

    found = clustered_mean(scores, range(len(scores)) if clusters is None else clusters, strata)
    n, share = found.n, min(max(found.mean, 0.0), 1.0)
    effective = n / found.typical_size
    if found.spread > 0:
        effective = share * (1 - share) / max(found.variance if found.typical_size > 1 else 0.0, found.spread / n)
    if found.typical_size > 1 and found.variance > 0:
        effective *= (norm.isf(ALPHA) / t.isf(ALPHA, found.degrees_of_freedom)) ** 2
    elif found.typical_size > 1:
        effective = min(effective, n / found.typical_size)
    part = proportion(share * effective, effective)
    return Estimate(share, min(part.low, share), max(part.high, share), n)


def proportion(right: float, n: float) -> Estimate:
    """`accuracy` from the number of right answers among n. Raises `ValueError` unless 0 <= right <= n and n > 0."""
    from statsmodels.stats.proportion import proportion_confint

    if not (n > 0 and 0 <= right <= n):
        raise ValueError(f"right must be between 0 and n, and n above 0, got {right} of {n}")
    low, high = proportion_confint(right, n, alpha=2 * ALPHA, method="wilson")
    return Estimate(float(right / n), float(low), float(high), round(n))


@dataclass(frozen=True)
class ClusteredMean:
    """A mean over items, and how uncertain it is if items of one cluster are alike.

    variance: of the mean, cluster-robust. degrees_of_freedom: that the variance was estimated with. spread: variance
    of the items (within strata, if there are any). icc: how alike items of one cluster are, 0 to 1. sums, sizes: per
    cluster, (clusters,).
    """

    mean: float
    variance: float
    spread: float
    degrees_of_freedom: float
    icc: float
    sums: Floats
    sizes: Floats

    @property
    def n(self) -> int:
        return round(float(self.sizes.sum()))

    @property
    def typical_size(self) -> float:
        """The size of the cluster that an item lies in, on average (Kish 1965): n / typical_size is what the items
        would be worth if every cluster were one item."""
        return float((self.sizes**2).sum() / self.sizes.sum())

    @property
    def design_effect(self) -> float:
        """How many times the variance of independent items (Kish 1965): 1 + (typical size - 1) x icc."""
        return 1 + (self.typical_size - 1) * self.icc


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable], strata: Sequence[Hashable] | None = None
) -> ClusteredMean:
    """The mean of values (items) whose clusters are independent of each other; deviations are those from the mean of
    an item's stratum.

    The sum of squared deviations of clusters is too small an estimate, and steadier than it looks, if clusters are few
    or uneven. Both are put right as Bell and McCaffrey (2002) do: every deviation is scaled to be unbiased, and the
    degrees of freedom are Satterthwaite's, under a working model in which items of a cluster correlate by `icc`
    (Imbens and Kolesar 2016), itself estimated from the pairs within clusters. Raises `ValueError` if there are no
    values or the lengths differ.
    """
    import numpy as np

    array = _finite(values)
    groups = [0] * len(array) if strata is None else strata
    if not len(array) == len(clusters) == len(groups):
        raise ValueError(
            f"values, clusters and strata must be equally long, got {len(array)}, {len(clusters)} and {len(groups)}"
        )
    member, group = _numbered(clusters), _numbered(groups)
    sums: Floats = np.bincount(member, array).astype(np.float64)
    sizes: Floats = np.bincount(member).astype(np.float64)
    mean = float(array.mean())
    deviation = array - (np.bincount(group, array) / np.bincount(group))[group]
    squares = float((deviation**2).sum())
    pairs = float((sizes * (sizes - 1)).sum())
    residuals: Floats = np.bincount(member, deviation).astype(np.float64)
    icc = 0.0
    if pairs:
        alike = (float((residuals**2).sum()) - squares) / pairs
        icc = min(max(alike * len(array) / squares, 0.0), 1.0) if squares > 0 else 1.0
    variance, freedom = _robust(residuals, sizes, icc)
    spread = squares / (len(array) - int(group.max()))  # one stratum: the plain variance
    return ClusteredMean(mean, variance, spread, freedom, icc, sums, sizes)


def _robust(residuals: Floats, sizes: Floats, icc: float) -> tuple[float, float]:
    """The variance of the mean and its degrees of freedom; (0, 0) from one cluster, which shows no variance.

    residuals: a cluster's sum minus its size x the mean, (clusters,). With weights w = size / n and cluster variances
    v under the working model, their covariance is diag(v) - w v' - v w' + w w' sum(v).
    """
    import numpy as np

    if len(sizes) < 2:
        return 0.0, 0.0
    n = float(sizes.sum())
    kinds, position, counts = np.unique(sizes, return_inverse=True, return_counts=True)  # equal sizes: equal terms
    weight, own = kinds / n, kinds * (1 - icc) + kinds**2 * icc
    total = float((counts * own).sum())
    between = np.outer(weight, weight) * total - np.outer(weight, own) - np.outer(own, weight)  # of two clusters
    expected = own + np.diag(between)  # of a squared residual
    scale = own / expected
    trace = float((counts * own).sum())  # = sum of scale x expected
    squared = np.outer(scale, scale) * between**2
    squares = float(counts @ squared @ counts - counts @ np.diag(squared) + counts @ own**2)
    return float((scale[position] * residuals**2).sum()) / n**2, trace**2 / squares


def _needed(quantile: float) -> int:
    """The fewest samples that bound a quantile on both sides with 95%."""
    return math.ceil(math.log(ALPHA) / math.log(max(quantile, 1 - quantile)))


def _lower_limit(values: Floats, quantile: float) -> float:
    """Below the quantile with probability 1 - `ALPHA`. values: sorted, enough for `quantile`."""
    from scipy.stats import binom

    n = len(values)
    # P(rank r lies below the quantile) = P(at least r samples do), which falls with r. Rank r is below surely enough,
    # rank r + 1 is not.
    rank = min(max(int(binom.ppf(ALPHA, n, quantile)), 1), n - 1)
    sure, unsure = (float(binom.sf(r - 1, n, quantile)) for r in (rank, rank + 1))
    odds = rank * (1 - quantile) / ((n - rank) * quantile)
    share = 1 / (1 + odds * (1 - ALPHA - unsure) / max(sure - (1 - ALPHA), 1e-300))
    return float(values[rank - 1] * (1 - share) + values[rank] * share)


def _numbered(labels: Sequence[Hashable]) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Equal labels get equal numbers, from 0."""
    import numpy as np

    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(label, len(index)) for label in labels], dtype=np.intp)


def _finite(samples: Sequence[float]) -> Floats:
    import numpy as np

    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("samples must hold at least one number, got none")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got NaN or infinity")
    return values
