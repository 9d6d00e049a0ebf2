"""Figures carry their unit in their name (`ttft_seconds_p50`); here the name becomes a heading people read."""

from __future__ import annotations

import re
from dataclasses import dataclass

PATTERN = re.compile(r"(?P<what>\w+?)_(?P<unit>tokens_per_second|per_second|seconds|bytes)(?:_p(?P<percent>\d+))?")
UNITS = {"tokens_per_second": ("tokens/s", 1.0), "seconds": ("ms", 1e3), "bytes": ("MB", 1e-6)}
ACRONYMS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL"}


@dataclass(frozen=True)
class Quantity:
    """How a figure is shown: `label` in words, `unit`, and the factor from the stored unit to the shown one."""

    label: str
    unit: str
    factor: float

    def show(self, value: float | None) -> str:
        """Three significant digits in the shown unit; a dash for what is not known."""
        return "–" if value is None else digits(value * self.factor)


def quantity(figure: str) -> Quantity:
    """`latency_seconds_p90` is "latency p90" in ms; a name without a known unit is shown as it is."""
    match = PATTERN.fullmatch(figure)
    if match is None:
        return Quantity(figure.replace("_", " "), "", 1.0)
    what, percent = match["what"].replace("_", " "), match["percent"]
    unit, factor = UNITS.get(match["unit"], (f"{what}/s", 1.0))
    suffix = {None: "", "50": " (median)"}.get(percent, f" p{percent}")
    return Quantity(ACRONYMS.get(what, what) + suffix, unit, factor)


def digits(value: float) -> str:
    """Three significant digits, thousands grouped, never in exponents: 0.123, 12.3, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - int(f"{rounded:e}".split("e")[1]))
    return f"{rounded:,.{decimals}f}"
