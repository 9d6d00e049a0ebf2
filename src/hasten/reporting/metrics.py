"""`metrics.json`: the few numbers that `dvc metrics show` and `dvc metrics diff` should put in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hasten.artifacts import Json

SPLIT = "validation"


def metrics(measurements: Sequence[Json], verdict: Json) -> Json:
    """Per scenario the champion, its decision, speed-up and accuracy difference; the baseline's accuracy per task;
    how many trials ended how. Rounded to what the numbers carry; what is not known is left out."""
    result: Json = {name: _scenario(entry) for name, entry in verdict["scenarios"].items()}
    references = {entry["reference"] for entry in verdict["scenarios"].values()}
    baseline = next((m for m in measurements if m["trial"] in references), None)
    if baseline is not None:
        tasks = {name: task[SPLIT]["accuracy"] for name, task in baseline["quality"].items() if SPLIT in task}
        result["baseline_accuracy"] = {name: round(value, 4) for name, value in tasks.items()}
    result["trials"] = dict(sorted(Counter(m["status"] for m in measurements).items()))
    return result


def _scenario(entry: Json) -> Json:
    speedup, difference = entry["speedup"] or {}, entry["accuracy_difference"] or {}
    low, high = speedup.get("ci95") or (None, None)
    values: Json = {
        "champion": entry["champion"],
        "decision": entry["decision"],
        "speedup": _rounded(speedup.get("ratio"), 3),
        "speedup_low": _rounded(low, 3),
        "speedup_high": _rounded(high, 3),
        "accuracy_difference_points": _rounded(difference.get("points"), 2),
        "p_holm": _rounded(difference.get("p_holm"), 5),
        "needs_items": entry["needs_items"],
    }
    return {name: value for name, value in values.items() if value is not None}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
