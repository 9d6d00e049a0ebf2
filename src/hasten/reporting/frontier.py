"""Accuracy against speed, the trade-off in one picture.

A trial is on the *frontier* if no other is at least as fast and more accurate: everything else is dominated, and
choosing among the frontier is the only real choice. Speed is relative to the reference (2x: half its latency), on
a logarithmic axis, so that equal factors are equal distances. Accuracy is that of the validation split. Trials that
took turns with the reference stand where that put them (in the confirmation, or else in the qualifying round); only the
others stand where screening did, minutes apart from the reference on a machine that may have drifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.artifacts import Json
from hasten.evaluation.statistics import Estimate

SPLIT = "validation"


@dataclass(frozen=True)
class Point:
    """A trial that competes in a scenario. figure: its headline (with its unit); speed: more is better."""

    trial: str
    variant: str
    engine: str
    accuracy: Estimate
    figure: Estimate
    lower_is_better: bool

    @property
    def speed(self) -> float:
        return 1 / self.figure.value if self.lower_is_better else self.figure.value

    def ratio(self, reference: float) -> Estimate:
        """Speed relative to a reference's figure; the interval is this trial's own."""
        ratios = [
            reference / x if self.lower_is_better else x / reference
            for x in (self.figure.value, self.figure.low, self.figure.high)
        ]
        return Estimate(ratios[0], min(ratios), max(ratios), self.figure.n)


def points(measurements: Sequence[Json], scenario: str, entry: Json | None = None) -> list[Point]:
    """Every trial that ran natively and whose accuracy and speed are both known, fastest first.

    entry: the verdict's on the scenario, which knows the ratios of those that took turns; None: as screened.
    """
    found: list[Point] = []
    for measurement in measurements:
        speed = measurement["speed"].get(scenario, {})
        answers = measurement["pooled"].get(SPLIT)
        value = speed.get(speed.get("headline"))
        if measurement["status"] != "ok" or not measurement["native"] or not value or not answers:
            continue
        low, high = speed["ci95"][speed["headline"]] or (value, value)
        found.append(
            Point(
                trial=measurement["trial"],
                variant=measurement["variant"],
                engine=measurement["engine"],
                accuracy=Estimate(answers["accuracy"], answers["ci95"][0], answers["ci95"][1], answers["n"]),
                figure=Estimate(value, low, high, speed["n"]),
                lower_is_better=speed["lower_is_better"],
            )
        )
    placed = in_turns(found, entry) if entry else found
    return sorted(placed, key=lambda point: (-point.speed, -point.accuracy.value, point.trial))


def in_turns(screened: Sequence[Point], entry: Json) -> list[Point]:
    """The points with the figures that their ratios to the reference, taken side by side, give them.

    The reference keeps its own figure. A confirmed trial has its confirmed interval, another its screened one, moved.
    """
    reference = next((point for point in screened if point.trial == entry["reference"]), None)
    if reference is None:
        return list(screened)
    ratios = (entry.get("qualifying") or {}).get("speeds") or {}

    def placed(point: Point) -> Point:
        confirmed = (entry["confirmed"].get(point.trial) or {}).get("speedup") or {}
        if point is reference or not (ratio := confirmed.get("ratio") or ratios.get(point.trial)):
            return point
        moved = point.ratio(reference.figure.value)
        low, high = confirmed.get("ci95") or (x * ratio / moved.value for x in (moved.low, moved.high))
        sign = -1 if point.lower_is_better else 1
        value, *ends = (reference.figure.value * x**sign for x in (ratio, low, high))
        return replace(point, figure=Estimate(value, min(ends), max(ends), point.figure.n))

    return [placed(point) for point in screened]


def frontier(candidates: Sequence[Point]) -> list[Point]:
    """The points that no other beats: fastest first, each more accurate than all faster ones."""
    best: list[Point] = []
    for point in sorted(candidates, key=lambda point: (-point.speed, -point.accuracy.value)):
        if not best or point.accuracy.value > best[-1].accuracy.value:
            best.append(point)
    return best
