"""Who goes to the final: per scenario, the reference and the fastest variants that may still answer right.

The reference is what the user has today: the float baseline on the engine that runs it fastest. Who that is, and who
is ahead of whom, screening alone cannot tell on a machine that drifts, so those in question take turns once more
(`hasten.evaluation.qualifying`). Everything else must beat the reference on speed and must not *clearly* have lost
accuracy on the validation split; the benefit of the doubt is given here, because the test split decides (`confirm`),
once, on few candidates: choosing and judging on the same items would flatter the winner. Only native runs compete: a
dequantised run is a reference for quality.

    python pipelines/select_finalists.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hasten.artifacts import SCHEMA, Json
from hasten.errors import UserError
from hasten.evaluation.comparison import Comparison, compare
from hasten.evaluation.qualifying import Qualified, taking_part

if TYPE_CHECKING:
    import pandas as pd

SPLIT = "validation"
Qualify = Callable[[str, Sequence[str]], Qualified]
"""Plays a scenario's qualifying round of these trials."""
LIKELY = 0.1
"""Below this p-value, validation makes it likely that a candidate keeps every margin."""


def select(
    measurements: Sequence[Json],
    predictions: Mapping[str, pd.DataFrame],
    *,
    plan: str,
    scenarios: Sequence[str],
    margin_points: float,
    language_margin_points: float,
    finalists: int = 2,
    qualifiers: int = 6,
    qualify: Qualify | None = None,
    seed: int = 0,
) -> Json:
    """`finalists.json` from all measurements (`measurements/T.json`) and predictions (by trial name).

    Each scenario's headline figure, and whether less of it is better, are what its measurements say.
    finalists: how many candidates per scenario are confirmed, at most. qualify: plays a round of the trials it is given
    in a scenario, at most `qualifiers` of them; None: screening decides. Raises `UserError` for options out of range.
    """
    if finalists < 1:
        raise UserError(f"finalists must be at least 1, got {finalists}")
    if qualifiers < 2:
        raise UserError(f"qualifiers must be at least 2, got {qualifiers}")
    for field, margin in (("margin_points", margin_points), ("language_margin_points", language_margin_points)):
        if not 0 < margin < 100:
            raise UserError(f"{field} must be between 0 and 100, got {margin}")
    margins = {"margin_points": margin_points, "language_margin_points": language_margin_points}
    entries = {}
    for name in scenarios:
        entries[name] = _choose(measurements, predictions, name, margins, finalists, qualifiers, qualify, seed)
    return {"schema": SCHEMA, "plan": plan, **margins, "scenarios": entries}


def _choose(
    measurements: Sequence[Json],
    predictions: Mapping[str, pd.DataFrame],
    scenario: str,
    margins: Mapping[str, float],
    finalists: int,
    most: int,
    qualify: Qualify | None,
    seed: int,
) -> Json:
    speeds, rejected = _runners(measurements, scenario)
    entry: Json = {"reference": None, "finalists": [], "rejected": rejected, **headline(measurements, scenario)}
    baselines = [m["trial"] for m in measurements if m["trial"] in speeds and is_baseline(m)]
    if not baselines:
        return entry | {"why": "no trial of the float baseline was measured, so there is nothing to compare with"}
    screened = max(baselines, key=lambda trial: speeds[trial])
    likely: dict[str, bool] = {}  # rivals that may keep every margin: whether that is likely
    for trial in speeds:
        if trial not in baselines:
            comparison = _compare(predictions, trial, screened, seed=seed, **margins)
            if reason := accuracy_loss(comparison, **margins):
                rejected[trial] = reason
            else:
                likely[trial] = comparison.overall_p < LIKELY

    speeds = {trial: speed for trial, speed in speeds.items() if trial not in rejected}
    round_of = taking_part(speeds, baselines, most)
    played = qualify(scenario, round_of) if qualify and round_of else Qualified(why="screening decided")
    if played.speeds:
        for trial in speeds.keys() - played.speeds.keys():
            rejected[trial] = (
                played.failed.get(trial) or f"left behind: {speeds[trial] / speeds[screened]:.2f}x, screened"
            )
        speeds = played.speeds
        baselines = [trial for trial in baselines if trial in speeds]
        if not baselines:
            return entry | {"why": f"no float baseline ran beside its rivals: {played.failed}"}
    reference = max(baselines, key=lambda trial: speeds[trial])
    ratios = {trial: speeds[trial] / speeds[reference] for trial in sorted(speeds, key=lambda trial: -speeds[trial])}
    candidates: dict[str, bool] = {}  # fastest first
    for trial, ratio in ratios.items():
        if trial != reference and ratio <= 1:
            rejected[trial] = f"not faster than the reference: {ratio:.2f}x"
        elif trial != reference:
            candidates[trial] = likely.get(trial, True)
    chosen = seats(candidates, finalists)
    for trial in candidates:
        if trial not in chosen:
            rejected[trial] = (
                f"{ratios[trial]:.2f}x, but the last place went to {chosen[-1]}, likelier to keep its accuracy"
                if ratios[trial] > ratios[chosen[-1]]
                else f"slower than the finalists: {ratios[trial]:.2f}x"
            )
    peaks = {m["trial"]: m.get("peak_memory_bytes") for m in measurements if m["trial"] in (reference, *chosen)}
    qualifying = {"speeds": ratios if played.speeds else None, "why": played.why}
    return entry | {
        "reference": reference, "finalists": chosen, "qualifying": qualifying, "peak_memory_bytes": peaks
    }  # fmt: skip


def is_baseline(measurement: Json) -> bool:
    """Whether a trial ran the float baseline: the first variant of its line, made by `identity`, and its own numbers.

    An engine's own rounding of it is a rival: if it were the reference, what it loses would be nobody's loss.
    """
    first = len(measurement["lineage"]) == 1 and measurement["method"] == "identity"
    return first and not measurement.get("converted")


def seats(likely: Mapping[str, bool], finalists: int) -> list[str]:
    """The fastest candidates; but one seat is kept for the fastest that is likely to keep every margin.

    Otherwise a few very fast, doubtful variants could crowd out the one that would have won. likely: by
    candidate, fastest first.
    """
    chosen = list(likely)[:finalists]
    safe = next((trial for trial, yes in likely.items() if yes), None)
    return chosen if safe is None or safe in chosen else [*chosen[:-1], safe]


def accuracy_loss(comparison: Comparison, *, margin_points: float, language_margin_points: float) -> str | None:
    """Why a trial's accuracy is clearly beyond a margin, or None if it may still be within."""
    parts = [("", comparison.pooled.difference, margin_points)]
    parts += [(f" in {name}", part.difference, language_margin_points) for name, part in comparison.languages.items()]
    for where, part, margin in parts:
        if part.points.high < -margin:
            return (
                f"loses {-part.points.value:.1f} points of accuracy{where} on validation, "
                f"clearly more than {margin:g} (95% interval {-part.points.high:.1f} to {-part.points.low:.1f})"
            )
    return None


def _compare(
    predictions: Mapping[str, pd.DataFrame], trial: str, reference: str, *, seed: int, **margins: float
) -> Comparison:
    for name in (trial, reference):
        if name not in predictions:
            raise UserError(f"predictions of trial {name} do not exist; evaluate it again")
    candidate, baseline = (predictions[name][predictions[name]["split"] == SPLIT] for name in (trial, reference))
    try:
        return compare(candidate, baseline, seed=seed, **margins)
    except UserError as error:
        raise UserError(f"{trial} against {reference}: {error}") from None


def headline(measurements: Sequence[Json], scenario: str) -> Json:
    """The figure a scenario is judged by, {headline, lower_is_better}; None where no trial measured it."""
    for measurement in measurements:
        if entry := measurement["speed"].get(scenario):
            return {"headline": entry["headline"], "lower_is_better": entry["lower_is_better"]}
    return {"headline": None, "lower_is_better": None}


def _runners(measurements: Sequence[Json], scenario: str) -> tuple[dict[str, float], dict[str, str]]:
    """The speed (more is better) of every trial that competes in a scenario, and why the others do not."""
    speeds: dict[str, float] = {}
    rejected: dict[str, str] = {}
    for measurement in measurements:
        trial, entry = measurement["trial"], measurement["speed"].get(scenario, {})
        figure = entry.get(entry.get("headline"))
        if measurement["status"] != "ok":
            rejected[trial] = f"{measurement['status']}: {measurement['error']}"
        elif not measurement["native"]:
            rejected[trial] = "not native: the engine dequantises this variant first"
        elif not figure:
            rejected[trial] = f"its speed in scenario {scenario} was not measured"
        else:
            speeds[trial] = 1 / figure if entry["lower_is_better"] else figure
    return speeds, rejected
