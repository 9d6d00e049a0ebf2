"""How many times faster: ratios from rounds in which both sides took turns on the same machine at the same time.

A machine's speed drifts by tens of percent within seconds (a neighbour, a clock, a page layout drawn when the process
started), so latencies taken one after another say little about a ratio. In a *round* fresh processes of both sides are
loaded side by side and take short turns, there and back (A B B A). One *pass* there and back gives one logarithm of
the ratio of medians, in which most drift cancels; a round gives their trimmed mean, which a disturbed pass cannot move
far. What no pass within a round can show is how processes differ, so rounds, not requests, are what is counted.

How many rounds suffice is not known beforehand, and looking until the interval is narrow makes it cover too little.
Stein's two-stage procedure (1945) keeps it exact: the variance of the first few rounds alone fixes both how many
rounds there will be and how wide the interval is, and for normal values it is independent of every round's mean.

    log ratio of a pass    log(median reference / median candidate)   (the other way round where more is better)
    of a round             20% trimmed mean of its passes
    rounds                 N = max(R, ceil((t s / log(1 + precision))^2)),  s, t from the first R rounds
    speed-up               exp(mean of N rounds +- t s / sqrt(N))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hasten.evaluation.statistics import ALPHA, Estimate, Unknown

TRIM = 0.2
"""Share of the passes of a round that is cut off at either end: 1 of 5 to 9, 2 of 10 to 14."""

Passes = Sequence[Sequence[float]]
"""Per pass, the headline values of its turn there and its turn back."""


@dataclass(frozen=True)
class Rounds:
    """The logarithms of the ratio, one per round, and how many of them were the first stage."""

    log_ratios: list[float]
    first_stage: int

    @property
    def standard_error(self) -> float:
        """Of the mean logarithm, from the first stage's variance; at least 2 rounds."""
        return _spread(self.log_ratios[: self.first_stage]) / math.sqrt(len(self.log_ratios))

    def estimate(self) -> Estimate | Unknown:
        """The speed-up with Stein's interval; n counts the rounds."""
        n = len(self.log_ratios)
        first = min(self.first_stage, n)
        if first < 2:
            return Unknown(f"a speed-up needs at least 2 rounds, got {n}", n)
        reach = _critical(first) * self.standard_error
        mean = sum(self.log_ratios) / n
        return Estimate(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), n)


def speedup(
    reference: Sequence[Passes], candidate: Sequence[Passes], *, first_stage: int, lower_is_better: bool = True
) -> Estimate | Unknown:
    """How many times faster the candidate is, with Stein's 95% interval (Stein 1945).

    reference, candidate: per round, per pass, the headline values, both sides with the same rounds and passes.
    first_stage: how many rounds were fixed beforehand; if the time ended before them, the rounds that there are make
    an ordinary t interval, which is right as long as the time does not look at the values; rounds without a pass are
    left out. `Unknown` from fewer than 2 rounds: how processes differ is then invisible. Raises `ValueError` if the
    sides do not match, a value is not positive, or more rounds follow a first stage of fewer than 2.
    """
    return rounds(reference, candidate, first_stage=first_stage, lower_is_better=lower_is_better).estimate()


def rounds(
    reference: Sequence[Passes], candidate: Sequence[Passes], *, first_stage: int, lower_is_better: bool = True
) -> Rounds:
    """The evidence under `speedup`, with the same arguments and errors."""
    if len(reference) != len(candidate):
        raise ValueError(f"both sides must have the same rounds, got {len(reference)} and {len(candidate)}")
    if first_stage < min(2, len(reference)):
        raise ValueError(f"first_stage must be at least 2 rounds, got {first_stage} of {len(reference)}")
    pairs = list(zip(reference, candidate, strict=True))
    played = [bool(ours or theirs) for ours, theirs in pairs]  # a round that the time cut off before its first pass
    ratios = [
        round_log_ratio(*pair, lower_is_better=lower_is_better) for pair, yes in zip(pairs, played, strict=True) if yes
    ]
    return Rounds(ratios, sum(played[:first_stage]))


def round_log_ratio(reference: Passes, candidate: Passes, *, lower_is_better: bool = True) -> float:
    """The logarithm of how many times faster the candidate was in one round: the 20% trimmed mean over its passes.

    The trimmed mean loses little where passes are clean and stands one disturbed pass in five (Tukey 1962).
    """
    from scipy.stats import trim_mean

    if not len(reference) == len(candidate) > 0:
        raise ValueError(f"both sides must have the same passes, got {len(reference)} and {len(candidate)}")
    sign = 1.0 if lower_is_better else -1.0
    logs = [sign * (_log_median(ours) - _log_median(theirs)) for ours, theirs in zip(reference, candidate, strict=True)]
    return float(trim_mean(logs, TRIM))


def rounds_needed(log_ratios: Sequence[float], precision: float) -> int:
    """How many rounds in all give an interval of at most a factor 1 + precision to either side (Stein 1945).

    log_ratios: of the first stage, and of it alone: computed again from later rounds, the interval would no longer
    cover. Several candidates may share the largest of their numbers: each one's mean stays independent of the first
    stage's variances. Raises `ValueError` from fewer than 2 rounds or unless precision > 0.
    """
    if len(log_ratios) < 2:
        raise ValueError(f"log_ratios must hold at least 2 rounds, got {len(log_ratios)}")
    if not precision > 0:
        raise ValueError(f"precision must be above 0, got {precision}")
    reach = _critical(len(log_ratios)) * _spread(log_ratios)
    return max(len(log_ratios), math.ceil((reach / math.log1p(precision)) ** 2))


def _log_median(values: Sequence[float]) -> float:
    middle = median(values) if len(values) else math.nan
    if not (middle > 0 and math.isfinite(middle)):
        raise ValueError(f"a pass must hold positive values, got {list(values)}")
    return math.log(middle)


def _critical(first_stage: int) -> float:
    from scipy.stats import t

    return float(t.isf(ALPHA, first_stage - 1))


def _spread(log_ratios: Sequence[float]) -> float:
    import numpy as np

    return float(np.std(log_ratios, ddof=1))
