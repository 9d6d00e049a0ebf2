"""Speed: what a scenario's samples say, with how sure we are of it.

Every figure is a percentile of one value per request, with its 95% interval; one that so few
requests cannot support is null, with the reason beside it. The verdict on the whole is its validity:
`noisy` if other processes were computing meanwhile, `preview` if there were too few requests,
`valid` otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from hasten.artifacts import Json
from hasten.evaluation.contention import NOISY_CORES
from hasten.evaluation.statistics import Estimate, Unknown, median, percentile
from hasten.scenario.base import Figure, Scenario
from hasten.scenario.timing import Sample


def speed(scenario: Scenario, samples: Sequence[Sample], contention: float | None, *, seed: int = 0) -> Json:
    """One entry of a measurement's `speed`: validity, n, the figures by name, their `ci95` and `why`.

    contention: cores that other processes used meanwhile, None if unknown.
    """
    estimates = {name: estimate(figure, seed) for name, figure in scenario.figures(samples).items()}
    known = {name: value for name, value in estimates.items() if isinstance(value, Estimate)}
    return {
        "validity": validity(scenario, len(samples), contention),
        "n": len(samples),
        "headline": scenario.headline_figure,
        "lower_is_better": scenario.lower_is_better,
        **{name: known[name].value if name in known else None for name in estimates},
        "ci95": {name: known[name].ci95 if name in known else None for name in estimates},
        "contention_cores": contention,
        "options": scenario.describe(),
        "why": {name: value.why for name, value in estimates.items() if isinstance(value, Unknown)},
    }


def estimate(figure: Figure, seed: int = 0) -> Estimate | Unknown:
    """A figure with its interval, `Unknown` if there are too few values for it."""
    if figure.percentile == 50:
        return median(figure.values, seed=seed)
    return percentile(figure.values, figure.percentile)


def validity(scenario: Scenario, requests: int, contention: float | None) -> str:
    """`noisy`, `preview` or `valid`. Contention that could not be read does not count as noise; it is null."""
    if contention is not None and contention > NOISY_CORES:
        return "noisy"
    return "preview" if requests < scenario.minimum_requests else "valid"
