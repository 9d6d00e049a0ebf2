"""Every compression method in a row, from the code; and what methods did to a plan's model, from its measurements.

    python -m hasten.reporting.methods             # Markdown, as in docs/methods.md
    python -m hasten.reporting.methods default     # with the results of artifacts/default

Speed is what `evaluate` screened, one trial after the other: the time per token beside the unchanged model's on the
same engine. A speed-up that has been confirmed, in turns and with an interval, is in the plan's report.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hasten.artifacts import Json, read_json
from hasten.compression.base import Compressor
from hasten.config import discover


def methods() -> str:
    """A row for each method: what it does, what it needs, which grid it lands on."""
    rows = [["method", "what it does", "needs", "grid"]]
    for name, component in discover("compression").items():
        assert issubclass(component, Compressor)
        title = (inspect.getdoc(importlib.import_module(component.__module__)) or "").split("\n")[0]
        rows.append([f"`{name}`", title.rstrip("."), component.needs, component.grids])
    return markdown(rows)


def results(measurements: Sequence[Json], made: Mapping[str, Json]) -> str:
    """A row for each trial that competes on speed, engine by engine. made: the records of `compress`, by variant."""
    competing = [m for m in measurements if m["status"] == "ok" and m["native"]]
    tasks = sorted({task for m in competing for task in m["quality"]})
    rows = [["variant", "made by", "engine", "MB read per token", "decoding", *tasks, "seconds to make"]]
    for engine in sorted({m["engine"] for m in competing}):
        own = [m for m in competing if m["engine"] == engine]
        floats = [m for m in own if len(m["lineage"]) == 1 and not m.get("converted")]
        unchanged = min(floats, key=token_seconds, default=None)
        for m in sorted(own, key=token_seconds, reverse=True):
            chain = [made[name] for name in m["lineage"]]
            methods_ = " > ".join(record["tags"]["method"] for record in chain)
            megabytes = f"{m['weight_bytes_per_token'] / 1e6:.2f}"
            speed = f"{token_seconds(unchanged) / token_seconds(m):.2f}x" if unchanged else "-"
            seconds = sum(record["metrics"]["build_seconds"] for record in chain)
            answers = [accuracy(m, unchanged, task) for task in tasks]
            rows.append([f"`{m['variant']}`", methods_, engine, megabytes, speed, *answers, f"{seconds:.1f}"])
    return markdown(rows)


def token_seconds(measurement: Json) -> float:
    """The median time per token after the first, in the first scenario that has one; else infinite."""
    times = [figures.get("tpot_seconds_p50") for figures in measurement["speed"].values()]
    return next((float(time) for time in times if time), float("inf"))


def accuracy(measurement: Json, unchanged: Json | None, task: str) -> str:
    """On validation in percent; in brackets what it differs by from the unchanged model, in points."""
    own, theirs = (m["quality"].get(task, {}).get("validation") if m else None for m in (measurement, unchanged))
    if own is None:
        return "-"
    shown = f"{100 * own['accuracy']:.1f}"
    return f"{shown} ({100 * (own['accuracy'] - theirs['accuracy']):+.1f})" if theirs else shown


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["-"] * len(rows[0]), *([cell.replace("|", "\\|") for cell in row] for row in rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(folder: Path) -> tuple[list[Json], dict[str, Json]]:
    """A plan's measurements, and its records of `compress` by variant."""
    measurements = [read_json(path) for path in sorted((folder / "measurements").glob("*.json"))]
    records = [read_json(path) for path in sorted((folder / "runs").glob("compress-*.json"))]
    return measurements, {record["tags"]["variant"]: record for record in records}


if __name__ == "__main__":
    sys.stdout.write(f"{methods()}\n")
    for plan in sys.argv[1:]:
        sys.stdout.write(f"\n{results(*load(Path('artifacts', plan)))}\n")
