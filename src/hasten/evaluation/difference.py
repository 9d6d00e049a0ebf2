"""How much accuracy was lost on the same items, and whether that is surely within a margin.

A variant is *non-inferior* only if the data rule out a loss beyond a margin that was declared beforehand: "no
difference was found" is not evidence. Items that both trials get right (or wrong) cancel out; only *flips* carry
noise. Where flips are few, or lie in few clusters, the textbook formulas claim too much, and in the direction that
hurts: a sample that happens to hold few losses also happens to show little variance. Both the interval and the test
are built against that; `benchmarks/coverage.py` checks them by simulation.

Intervals cover 95%, tests are one-sided at `ALPHA` = 2.5%. The decision is the test's; the interval, a bootstrap,
shows the range that the data leave and nearly always says the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from hasten.evaluation.statistics import ALPHA, ClusteredMean, Decision, Estimate, clustered_mean

RESAMPLES = 4000
ENOUGH_FLIPS = 6
"""Clusters with flips beyond which those that the bootstrap adds fade out: the sample then shows its own variance."""


@dataclass(frozen=True)
class Difference:
    """A paired difference in accuracy, in points (hundredths).

    points: candidate minus reference, with its cluster-bootstrap interval. standard_error: cluster-robust, points, with
    its degrees_of_freedom. effective_n: what the items are worth if every cluster were one item; design_effect: how
    many times the variance of independent items (both Kish 1965). gained, lost: shares of the items, 0 to 1.
    """

    points: Estimate
    standard_error: float
    clusters: int
    effective_n: float
    degrees_of_freedom: float
    design_effect: float
    gained: float
    lost: float


def paired_difference(
    candidate: Sequence[float],
    reference: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Candidate minus reference on the same items, with an interval from resampling whole clusters.

    candidate, reference: scores of the same items in the same order; clusters: items that are not independent share
    one. The percentile bootstrap (Davison and Hinkley 1997, section 3.8) with two repairs. Half a gained and half a
    lost cluster are added (Agresti and Min 2005 for items), as large as the design effect says that flips come, so
    that few or no flips do not make the interval collapse; they fade out beyond `ENOUGH_FLIPS`. And its tails are
    widened to those of Student's t with the degrees of freedom and the bias of the cluster-robust variance (Hesterberg
    2015, "expanded percentile"), without which few clusters cover too little. Raises `ValueError` if lengths differ or
    there are no items.
    """
    import numpy as np

    if not len(candidate) == len(reference) == len(clusters):
        raise ValueError(
            f"candidate, reference and clusters must be equally long, got {len(candidate)}, {len(reference)}, "
            f"{len(clusters)}"
        )
    change = np.asarray(candidate, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    found = clustered_mean(change.tolist(), clusters)
    low, high = _bootstrap(found, seed, resamples)
    return Difference(
        points=Estimate(100 * found.mean, 100 * min(low, found.mean), 100 * max(high, found.mean), found.n),
        standard_error=100 * math.sqrt(found.variance),
        clusters=len(found.sizes),
        effective_n=found.n / found.typical_size,
        degrees_of_freedom=found.degrees_of_freedom,
        design_effect=found.design_effect,
        gained=float(change.clip(min=0).mean()),
        lost=float((-change).clip(min=0).mean()),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that gained and lost answers are equally likely (McNemar 1947).

    It takes items as independent and asks for *any* difference: evidence beside the decision, not the decision.
    """
    from statsmodels.stats.contingency_tables import mcnemar as exact

    return min(1.0, float(exact([[0, gained], [lost, 0]], exact=True).pvalue))


def non_inferiority_p(difference: Difference, margin_points: float) -> float:
    """One-sided p-value of "the candidate loses at least `margin_points`"; small means non-inferior.

    A cluster-robust t-test whose standard error is what the *hypothesis* implies, never less (`null_error`). With the
    observed one instead, 5% and not 2.5% of true losses of the margin would pass where flips are rare.
    """
    from scipy.stats import t

    if difference.clusters < 2:
        return 1.0
    error = null_error(difference, margin_points)
    return float(t.sf((difference.points.value + margin_points) / error, difference.degrees_of_freedom))


def null_error(difference: Difference, margin_points: float) -> float:
    """The standard error of the difference in points if the loss were exactly the margin: the largest of three.

    Cluster-robust about the margin instead of the mean (a score test: the squares gain the distance's); that of the
    flips most likely under such a loss (restricted maximum likelihood, Tango 1998) times the design effect; and that of
    whole clusters lost with nothing gained, which holds where too few flips were seen to tell how they cluster.
    """
    margin = min(margin_points / 100, 0.5)
    distance = (difference.points.value + margin_points) / 100
    robust = (difference.standard_error / 100) ** 2 + distance**2 / difference.effective_n
    # Tango's estimate of P(lost): the larger root of 2 x^2 + b x + c = 0, per item.
    b = -difference.gained - difference.lost - margin * (2 - difference.gained + difference.lost)
    c = difference.lost * margin * (1 + margin)
    lost = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4
    likely = (2 * lost - margin - margin**2) * difference.design_effect / difference.points.n
    whole = margin * (1 - margin) / difference.effective_n
    return 100 * math.sqrt(max(robust, likely, whole))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several variants at once (Holm 1979): the smallest times their number, the next
    times one less, and so on, never falling. Right however the variants' errors are correlated."""
    from statsmodels.stats.multitest import multipletests

    if len(p_values) < 2:
        return list(p_values)
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def decide(difference: Difference, margin_points: float, p_value: float) -> Decision:
    """Non-inferior if `p_value` (adjusted where several are tested) is below `ALPHA`; inferior if the whole
    interval lies beyond the margin; otherwise the data leave it undecided."""
    if p_value < ALPHA:
        return Decision.non_inferior
    return Decision.inferior if difference.points.high < -margin_points else Decision.undecided


def _bootstrap(found: ClusteredMean, seed: int, resamples: int) -> tuple[float, float]:
    """The interval of `paired_difference`, as shares."""
    import numpy as np
    from scipy.stats import norm, t

    count = len(found.sizes)
    if count < 2:
        return -1.0, 1.0  # one cluster shows no variance
    # Clusters with equal (sum, size) are interchangeable, so drawing them is one small multinomial.
    pairs, weights = np.unique(found.sums + 1j * found.sizes, return_counts=True)
    flip = found.design_effect
    kinds = np.concatenate([np.stack([pairs.real, pairs.imag], axis=1), [[flip, flip], [-flip, flip]]])
    added = 0.5 * min(1.0, ENOUGH_FLIPS / max(int(np.count_nonzero(found.sums)), 1))
    weights = np.concatenate([weights, [added, added]])
    drawn = np.random.default_rng(seed).multinomial(count, weights / weights.sum(), size=resamples) @ kinds
    plain = float(((found.sums - found.mean * found.sizes) ** 2).sum()) / found.n**2
    bias = math.sqrt(found.variance / plain) if plain > 0 else 1.0
    tail = norm.sf(t.isf(ALPHA, found.degrees_of_freedom) * bias)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [tail, 1 - tail])
    return float(low), float(high)
