"""`report.html`: the whole study on one page that opens anywhere, offline, without scripts.

Verdict first, then the picture, the confirmation's evidence, every trial, accuracy per task and language, what was
rejected and why, what was run where and how long it took. Everything on it comes from the JSON files beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.artifacts import Json, replacing
from hasten.reporting.picture import heading
from hasten.reporting.units import Quantity, digits, quantity
from hasten.reporting.verdict import p_value, spoken

SPLIT = "validation"


def write(
    measurements: Sequence[Json],
    verdict: Json,
    picture: Path,
    path: Path,
    *,
    titles: Mapping[str, str] | None = None,
    stages: Mapping[str, Json] | None = None,
    flips: Mapping[str, Sequence[Json]] | None = None,
) -> None:
    """Write the page atomically.

    picture: `frontier.png`, embedded. flips: by finalist, the answers that changed. stages:
    `{name: {seconds, budget_seconds}}` of the run, either may be None.
    """
    text = render(measurements, verdict, picture.read_bytes(), titles=titles, stages=stages, flips=flips)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(
    measurements: Sequence[Json],
    verdict: Json,
    picture: bytes,
    *,
    titles: Mapping[str, str] | None = None,
    stages: Mapping[str, Json] | None = None,
    flips: Mapping[str, Sequence[Json]] | None = None,
) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hasten.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"digits": _digits, "points": _points, "percent": _percent, "p": p_value, "spoken": spoken}
    scenarios = {
        name: {
            "title": (titles or {}).get(name, name),
            "verdict": entry,
            "speed": speed_table(measurements, name),
            "limits": limits(measurements, name),
            "bars": bars(entry, verdict["margin_points"]),
            "first": quantity(entry["headline"] or "speed"),
        }
        for name, entry in verdict["scenarios"].items()
    }
    ok = [m for m in measurements if m["status"] == "ok"]
    return environment.get_template("report.html.j2").render(
        heading=heading(verdict),
        verdict=verdict,
        scenarios=scenarios,
        picture=base64.b64encode(picture).decode(),
        measurements=measurements,
        answered=[m for m in ok if SPLIT in m["pooled"]],
        tasks=tasks(ok),
        texts=texts(ok),
        flips=flips or {},
        languages=sorted({name for m in ok for name in m["pooled"].get(SPLIT, {}).get("languages", {})}),
        reference=next((m for m in ok if m["trial"] in {e["reference"] for e in verdict["scenarios"].values()}), None),
        stages=stage_rows(stages or {}),
        split=SPLIT,
    )


def tasks(measurements: Sequence[Json]) -> dict[str, Json]:
    """Per task its language, items and baselines: {language, n, majority, tfidf}."""
    found: dict[str, Json] = {}
    for measurement in measurements:
        for name, quality in measurement["quality"].items():
            if SPLIT in quality:
                facts = {"language": quality["language"], "n": quality[SPLIT]["n"], **quality["baseline"]}
                found.setdefault(name, {"majority": None, "tfidf": None} | facts)
    return dict(sorted(found.items()))


def limits(measurements: Sequence[Json], scenario: str) -> Json | None:
    """How far trials are from what the machine can do: {rows: [{trial, roofline}], cache, dram, date, validity}, those
    nearest to their limit first; ceilings in bytes per second. None where nothing is known of any."""
    known = [m for m in measurements if "decode" in m["roofline"].get(scenario, {})]
    if not known:
        return None
    known.sort(key=lambda m: -m["roofline"][scenario]["decode"]["share"])
    ceilings = known[0]["ceilings"]
    return {
        "rows": [{"trial": m["trial"], "roofline": m["roofline"][scenario]} for m in known],
        "cache": ceilings["cache_read_bytes_per_second"],
        "dram": ceilings["dram_read_bytes_per_second"],
        "date": ceilings["date"],
        "validity": ceilings["validity"],
    }


def texts(measurements: Sequence[Json]) -> Json:
    """Trials with figures on longer texts: {rows, languages, output_tokens, reference (has the baseline's figures)}."""
    rows = [m for m in measurements if m["bits_per_byte"] or m["continuation"]]
    continued = [m["continuation"] for m in rows if m["continuation"]]
    languages = {name for m in rows for name in m["bits_per_byte"] or {}}
    languages |= {name for entry in continued for name in entry["languages"]}
    return {
        "rows": rows,
        "languages": sorted(languages),
        "output_tokens": continued[0]["output_tokens"] if continued else 0,
        "reference": continued[0] if continued else None,
    }


def speed_table(measurements: Sequence[Json], scenario: str) -> Json:
    """{columns: [Quantity], rows: [{measurement, entry, cells}], missing: {label: why}, guesses}, fastest first.

    cells: {text, low, high, why} each. missing: figures that no trial could give, which get no column. guesses: whether
    any trial guessed tokens.
    """
    entries = [(m, m["speed"][scenario]) for m in measurements if scenario in m["speed"]]
    if not entries:
        return {"columns": [], "rows": [], "missing": {}, "guesses": False}
    first = entries[0][1]
    sign = 1 if first["lower_is_better"] else -1
    entries.sort(key=lambda pair: sign * (pair[1][first["headline"]] or sign * float("inf")))
    names = sorted(first["ci95"], key=lambda name: name != first["headline"])
    known = {name: quantity(name) for name in names if any(entry[name] is not None for _, entry in entries)}
    missing = {quantity(name).label: first["why"].get(name) for name in names if name not in known}
    rows = [
        {
            "measurement": measurement,
            "entry": entry,
            "cells": [_cell(entry, name, shown) for name, shown in known.items()],
        }
        for measurement, entry in entries
    ]
    guesses = any(entry.get("acceptance_rate") is not None for _, entry in entries)
    return {"columns": list(known.values()), "rows": rows, "missing": missing, "guesses": guesses}


def _cell(entry: Json, name: str, shown: Quantity) -> Json:
    low, high = entry["ci95"][name] or (None, None)
    why = entry["why"].get(name)
    return {"text": shown.show(entry[name]), "low": shown.show(low), "high": shown.show(high), "why": why}


def bars(entry: Json, margin_points: float) -> list[Json]:
    """The confirmed finalists' intervals as positions on common axes, in percent of the width.

    Each has `speedup` and `accuracy`, {left, width, dot, zero, margin}: where the interval starts, how wide it is,
    where the estimate, "no difference" and the margin are. None where there is no interval.
    """
    found = {t: row for t, row in entry["confirmed"].items() if row["accuracy_difference"] and row["speedup"]["ci95"]}
    if not found:
        return []
    fastest = max(row["speedup"]["ci95"][1] for row in found.values())
    slowest = min(row["speedup"]["ci95"][0] for row in found.values())
    spread = [x for row in found.values() for x in row["accuracy_difference"]["ci95"]]
    speed_axis = (min(0.8, slowest), max(fastest, 1.2) * 1.04)
    points_axis = (min([-margin_points, *spread]) - 0.7, max([0.0, *spread]) + 0.7)
    return [
        {
            "trial": trial,
            "row": row,
            "speedup": _bar(row["speedup"]["ratio"], row["speedup"]["ci95"], speed_axis, zero=1.0, margin=None),
            "accuracy": _bar(
                row["accuracy_difference"]["points"],
                row["accuracy_difference"]["ci95"],
                points_axis,
                zero=0.0,
                margin=-margin_points,
            ),
        }
        for trial, row in sorted(found.items(), key=lambda pair: -pair[1]["speedup"]["ratio"])
    ]


def stage_rows(stages: Mapping[str, Json]) -> list[Json]:
    """Stages with seconds, budget, and the bar's length in percent of the longest of both."""
    longest = max((x for s in stages.values() for x in (s["seconds"], s.get("budget_seconds")) if x), default=1.0)
    return [
        {
            "name": name,
            "seconds": stage["seconds"],
            "budget_seconds": stage.get("budget_seconds"),
            "length": 100 * (stage["seconds"] or 0) / longest,
            "limit": 100 * stage["budget_seconds"] / longest if stage.get("budget_seconds") else None,
            "over": bool(stage.get("budget_seconds")) and (stage["seconds"] or 0) > stage["budget_seconds"],
        }
        for name, stage in stages.items()
    ]


def _bar(value: float, ci95: Sequence[float], axis: tuple[float, float], *, zero: float, margin: float | None) -> Json:
    def at(x: float) -> float:
        return 100 * (x - axis[0]) / (axis[1] - axis[0])

    position = {"left": at(ci95[0]), "width": at(ci95[1]) - at(ci95[0]), "dot": at(value), "zero": at(zero)}
    return position | {"margin": None if margin is None else at(margin)}


def _digits(value: float | None, factor: float = 1.0) -> str:
    return "–" if value is None else digits(value * factor)


def _points(value: float) -> str:
    rounded = round(value, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
