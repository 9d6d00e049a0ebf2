"""Every compression method in a row, from the code; and what methods did to a plan's model, from its report.

    python -m hasten.reporting.methods                    # Markdown, as in docs/methods.md
    python -m hasten.reporting.methods default gemma3     # with the results in reports/default and reports/gemma3

`decoding` is what `evaluate` screened, one trial after the other: the time per token beside the unchanged model's on
the same engine. `confirmed` is a request's speed-up beside the report's reference, in turns and with an interval. What
an engine dequantised has answers, and no speed. In brackets is the difference from the unchanged model on that engine.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hasten.artifacts import Json, read_json
from hasten.compression.base import Compressor
from hasten.config import discover
from hasten.errors import UserError
from hasten.reporting.verdict import times


def methods() -> str:
    """A row for each method: what it does, what it needs, which grid it lands on."""
    rows = [["method", "what it does", "needs", "grid"]]
    for name, component in discover("compression").items():
        assert issubclass(component, Compressor)
        title = (inspect.getdoc(importlib.import_module(component.__module__)) or "").split("\n")[0]
        rows.append([f"`{name}`", title.rstrip("."), component.needs, component.grids])
    return markdown(rows)


def screened(measurements: Sequence[Json], made: Mapping[str, Json]) -> list[Json]:
    """What each trial that ran was measured to do, for `verdict.json`. made: as of `making`."""
    return [
        {
            "trial": m["trial"],
            "variant": m["variant"],
            "engine": m["engine"],
            "converted": m["kernel"] if m.get("converted") else None,
            "methods": [made[name]["tags"]["method"] for name in m["lineage"]],
            "dequantised": not m["native"],
            "weight_bytes_per_token": m["weight_bytes_per_token"],
            "token_seconds": token_seconds(m) if m["native"] else None,
            "accuracy": {task: own["validation"]["accuracy"] for task, own in m["quality"].items()},
            "bits_per_byte": m["bits_per_byte"] or {},
            "build_seconds": sum(made[name]["metrics"]["build_seconds"] for name in m["lineage"]),
        }
        for m in measurements
        if m["status"] == "ok" and all(name in made for name in m["lineage"])
    ]


def results(verdict: Json) -> str:
    """A row for each trial that a report's verdict says was screened, engine by engine.

    Raises `UserError` for a verdict that does not say.
    """
    if "screened" not in verdict:
        raise UserError(f"verdict.json of plan {verdict['plan']} must say what was screened: run its `report` again")
    trials = verdict["screened"]
    tasks = sorted({task for trial in trials for task in trial["accuracy"]})
    languages = sorted({language for trial in trials for language in trial.get("bits_per_byte", ())})
    confirmed: Json = {}
    for scenario in verdict["scenarios"].values():
        confirmed = {**scenario["confirmed"], **confirmed}
    texts = [f"bits per byte, {language}" for language in languages]
    head = ["variant", "made by", "engine", "MB read per token", "decoding", "confirmed"]
    rows = [[*head, *tasks, *texts, "seconds to make"]]
    for engine in sorted({trial["engine"] for trial in trials}):
        own = sorted((one for one in trials if one["engine"] == engine), key=slowness, reverse=True)
        unchanged = min(
            (one for one in own if len(one["methods"]) == 1 and not one["converted"]), key=slowness, default=None
        )
        for trial in own:
            widened = trial.get("dequantised", False)
            where = f"{engine} (dequantised)" if widened else engine
            megabytes = "-" if widened else f"{trial['weight_bytes_per_token'] / 1e6:.2f}"
            speedup = (confirmed.get(trial["trial"]) or {}).get("speedup")
            speeds = [ratio(unchanged, trial), times(speedup) if speedup else "-"]
            answers = [beside(trial, unchanged, "accuracy", task) for task in tasks]
            losses = [beside(trial, unchanged, "bits_per_byte", language) for language in languages]
            chain = f"{engine}'s own {trial['converted']}" if trial["converted"] else " > ".join(trial["methods"])
            seconds = f"{trial['build_seconds']:.1f}"
            rows.append([f"`{trial['variant']}`", chain, where, megabytes, *speeds, *answers, *losses, seconds])
    return markdown(rows)


def token_seconds(measurement: Json) -> float | None:
    """The median time per token after the first, in the first scenario that has one."""
    found = [figures.get("tpot_seconds_p50") for figures in measurement["speed"].values()]
    return next((float(seconds) for seconds in found if seconds), None)


def slowness(trial: Json) -> float:
    """Seconds per token; infinite where they are not known."""
    return trial["token_seconds"] or math.inf


def ratio(unchanged: Json | None, trial: Json) -> str:
    """How many times as fast as the unchanged model."""
    known = unchanged and unchanged["token_seconds"] and trial["token_seconds"]
    return f"{slowness(unchanged) / slowness(trial):.2f}x" if unchanged and known else "-"


SHOWN = {"accuracy": (100, 1), "bits_per_byte": (1, 3)}
"""How figures are shown: times what, and with how many decimals. Accuracies are in percent, differences in points."""


def beside(trial: Json, unchanged: Json | None, what: str, part: str) -> str:
    """A figure on validation, for a task or a language; in brackets what it differs by from the unchanged model."""
    own, theirs = (one.get(what, {}).get(part) if one else None for one in (trial, unchanged))
    if own is None:
        return "-"
    factor, digits = SHOWN[what]
    difference = "" if theirs is None else f" ({factor * (own - theirs):+.{digits}f})"
    return f"{factor * own:.{digits}f}{difference}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["-"] * len(rows[0]), *([cell.replace("|", "\\|") for cell in row] for row in rows[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def making(runs: Path) -> dict[str, Json]:
    """A plan's records of `compress`, by variant."""
    records = [read_json(path) for path in sorted(runs.glob("compress-*.json"))]
    return {record["tags"]["variant"]: record for record in records}


if __name__ == "__main__":
    sys.stdout.write(f"{methods()}\n")
    for plan in sys.argv[1:]:
        sys.stdout.write(f"\n{results(read_json(Path('reports', plan, 'verdict.json')))}\n")
