"""The terminal's view of a study: every trial in one table, the verdict below it.

from rich.console import Console; Console().print(summary(measurements, verdict))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hasten.artifacts import Json
from hasten.reporting.frontier import Point, points
from hasten.reporting.units import quantity

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def summary(measurements: Sequence[Json], verdict: Json, *, titles: Mapping[str, str] | None = None) -> RenderableType:
    """A table per scenario, fastest trial first, each followed by its sentence."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for name, entry in verdict["scenarios"].items():
        parts.append(trials(measurements, entry, name, (titles or {}).get(name, name)))
        style = "bold green" if entry["champion"] != entry["reference"] else "bold yellow"
        parts.append(Text(f"{entry['sentence']}\n", style=style))
    return Group(*parts)


def trials(measurements: Sequence[Json], entry: Json, scenario: str, title: str) -> Table:
    """One scenario's trials: accuracy on validation, speed against the reference, and what became of each."""
    from rich.table import Table
    from rich.text import Text

    shown = quantity(entry["headline"] or "speed")
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("trial", no_wrap=True)
    for heading in ("accuracy", "speed", f"{shown.label}\n{shown.unit}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("outcome", overflow="fold")
    competing = points(measurements, scenario, entry)
    reference = next((point for point in competing if point.trial == entry["reference"]), None)
    marks = {entry["reference"]: ("reference", "cyan")} | {entry["champion"]: ("champion", "bold green")}
    if entry["champion"] == entry["reference"]:
        marks = {entry["reference"]: ("reference, kept", "bold green")}
    for point in competing:
        outcome, style = marks.get(point.trial, (entry["rejected"].get(point.trial, ""), ""))
        figures = (accuracy(point), ratio(point, reference), shown.show(point.figure.value))
        table.add_row(point.trial, *figures, Text(outcome), style=style)
    others = [m for m in measurements if m["trial"] not in {point.trial for point in competing}]
    for measurement in others:
        outcome = entry["rejected"].get(measurement["trial"], measurement["status"])
        table.add_row(measurement["trial"], "", "", "", Text(outcome), style="dim")
    return table


def accuracy(point: Point) -> str:
    """Percent and half the width of its interval."""
    return f"{100 * point.accuracy.value:.1f}% ±{50 * (point.accuracy.high - point.accuracy.low):.1f}"


def ratio(point: Point, reference: Point | None) -> str:
    """How many times as fast as the reference."""
    return f"{point.ratio(reference.figure.value).value:.2f}x" if reference else ""
