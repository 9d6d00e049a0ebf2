"""What the confirmation proves: how much faster each finalist is, and whether it still answers right.

`confirm` only measures: raw latencies in interleaved blocks, raw answers to the test split. Here they become
evidence. A finalist is *non-inferior* if the pooled loss of accuracy is within its margin and so is the loss in
every language (within theirs): all tests must pass, so the largest of their p-values counts (Berger 1982), and
that one is Holm-adjusted over a scenario's finalists. It is *inferior* if an interval lies wholly beyond its
margin. Otherwise it is *undecided*, and the number of further test items that would decide is estimated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.evaluation.comparison import Comparison, compare
from hasten.evaluation.statistics import (
    ALPHA,
    Decision,
    Difference,
    Estimate,
    accuracy,
    decide,
    holm,
    items_needed,
    speedup,
)

if TYPE_CHECKING:
    import pandas as pd

SPLIT = "test"


def confirmed(confirmation: Json, predictions: pd.DataFrame, finalists: Json, *, seed: int = 0) -> Json:
    """Per scenario, the evidence on the reference and on every finalist.

    confirmation, finalists: the files of those names. predictions: `confirmation.parquet`, one row per trial and
    item. Returns `{scenario: {reference, trials: {trial: {status, error, validity, kernel, accuracy, speedup,
    accuracy_difference, decision, needs_items, decisive_language}}}}`; what is not known is None.
    Raises `UserError` if the files do not belong together.
    """
    margins = finalists["margin_points"], finalists["language_margin_points"]
    result: Json = {}
    for name, measured in confirmation["scenarios"].items():
        selected = finalists["scenarios"].get(name)
        if selected is None or measured["reference"] != selected["reference"]:
            raise UserError(f"confirmation and finalists disagree on the reference of scenario {name}; confirm again")
        lower_is_better = selected.get("lower_is_better", True)
        result[name] = _scenario(measured, predictions, margins, lower_is_better, seed)
    return result


def _scenario(
    measured: Json, predictions: pd.DataFrame, margins: tuple[float, float], lower_is_better: bool, seed: int
) -> Json:
    reference = measured["reference"]
    judged = predictions if predictions.empty else predictions[predictions["split"] == SPLIT]  # empty: no columns
    answers = {} if judged.empty else {str(name): part for name, part in judged.groupby("trial")}
    entries = {trial: _measured(row, answers.get(trial)) for trial, row in measured["trials"].items()}
    result: Json = {"reference": reference, "trials": entries}
    if reference not in entries or entries[reference]["status"] != "ok":
        return result
    comparisons: dict[str, Comparison] = {}
    for trial, entry in entries.items():
        if trial == reference or entry["status"] != "ok":
            continue
        blocks = [measured["trials"][side]["blocks"] for side in (reference, trial)]
        ratio = speedup(*blocks, lower_is_better=lower_is_better, seed=seed)
        entry["speedup"] = (
            {"ratio": ratio.value, "ci95": ratio.ci95, "n": ratio.n}
            if isinstance(ratio, Estimate)
            else {"ratio": None, "ci95": None, "n": ratio.n, "why": ratio.why}
        )
        if trial not in answers or reference not in answers:
            raise UserError(f"the {SPLIT}-split answers of {trial} and of {reference} are needed; confirm again")
        comparisons[trial] = compare(
            answers[trial], answers[reference], margin_points=margins[0], language_margin_points=margins[1], seed=seed
        )
    overall = [comparison.overall_p for comparison in comparisons.values()]
    for (trial, comparison), p_holm in zip(comparisons.items(), holm(overall), strict=True):
        decision, more, language = judge(comparison, p_holm, margins, tests=len(comparisons))
        evidence = comparison.describe(margins[0])
        evidence["p_holm"] = p_holm
        entries[trial] |= {"accuracy_difference": evidence, "decision": decision.value}
        entries[trial] |= {"needs_items": more, "decisive_language": language}
    return result


def judge(
    comparison: Comparison, p_holm: float, margins: tuple[float, float], *, tests: int = 1
) -> tuple[Decision, int | None, str | None]:
    """The decision; if it is undecided, about how many more items would make it; and the language that decides
    against the candidate (None: all languages pooled).

    p_holm: adjusted p-value that every margin is kept. margins: pooled and per language, points.
    """
    parts: list[tuple[str | None, Difference, float, float]] = [
        (None, comparison.difference, margins[0], comparison.p),
        *((name, part, margins[1], comparison.language_p[name]) for name, part in comparison.languages.items()),
    ]
    decisions = {name: decide(difference, margin, p_holm) for name, difference, margin, _ in parts}
    if Decision.inferior in decisions.values():
        return Decision.inferior, None, next(name for name, made in decisions.items() if made is Decision.inferior)
    if Decision.undecided not in decisions.values():
        return Decision.non_inferior, None, None
    failing = [
        (items_needed(difference, margin, tests=tests), name)
        for name, difference, margin, p in parts
        if p >= ALPHA / tests
    ]
    more, language = max(failing, key=lambda need: float("inf") if need[0] is None else need[0], default=(None, None))
    return Decision.undecided, more, language


def _measured(row: Json, answers: pd.DataFrame | None) -> Json:
    """What is known of a confirmed trial by itself; the comparison fills in the rest."""
    score = accuracy(answers["correct"].astype(float).tolist()) if answers is not None else None
    return {
        "status": row["status"],
        "error": row.get("error"),
        "validity": row.get("validity"),
        "kernel": row.get("kernel"),
        "accuracy": {"accuracy": score.value, "ci95": score.ci95, "n": score.n} if score else None,
        "speedup": None,
        "accuracy_difference": None,
        "decision": None,
        "needs_items": None,
        "decisive_language": None,
    }
