"""What the confirmation proves: how much faster each finalist is, and whether it still answers right.

`confirm` only measures: raw latencies in rounds of turns, raw answers to the test split. Here they become
evidence. A finalist is *non-inferior* if the pooled loss of accuracy is within its margin and so is the loss in
every language (within theirs): all tests must pass, so the largest of their p-values counts (Berger 1982), and
that one is Holm-adjusted over a scenario's finalists. It is *inferior* if an interval lies wholly beyond its
margin. Otherwise it is *undecided*, and the number of further test items that would decide is estimated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.evaluation.comparison import Comparison, clusters, compare
from hasten.evaluation.difference import decide, holm
from hasten.evaluation.power import items_needed, round_up
from hasten.evaluation.speedup import rounds
from hasten.evaluation.statistics import ALPHA, Decision, Unknown, accuracy

if TYPE_CHECKING:
    import pandas as pd

SPLIT = "test"


def confirmed(confirmation: Json, predictions: pd.DataFrame, finalists: Json, *, seed: int = 0) -> Json:
    """Per scenario, the evidence on the reference and on every finalist.

    confirmation, finalists: the files of those names. predictions: `confirmation.parquet`, one row per trial and
    item. Returns `{scenario: {reference, turns, trials: {trial: {status, error, validity, kernel, accuracy, speedup,
    accuracy_difference, decision, needs_items, needs_items_total, decisive_language}}}}`; what is not known is
    None. speedup: ratio, ci95, n (rounds), rounds (each one's ratio), and why if it is unknown. needs_items: in the
    decisive language if there is one, needs_items_total: with the others in proportion. Raises `UserError` if the
    files do not belong together.
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
    result: Json = {"reference": reference, "trials": entries, "turns": _turns(measured)}
    if reference not in entries or entries[reference]["status"] != "ok":
        return result
    comparisons: dict[str, Comparison] = {}
    for trial, entry in entries.items():
        if trial == reference or entry["status"] != "ok":
            continue
        entry["speedup"] = _speedup(measured, trial, lower_is_better)
        if trial not in answers or reference not in answers:
            raise UserError(f"the {SPLIT}-split answers of {trial} and of {reference} are needed; confirm again")
        comparisons[trial] = compare(
            answers[trial], answers[reference], margin_points=margins[0], language_margin_points=margins[1], seed=seed
        )
    adjusted = holm([comparison.overall_p for comparison in comparisons.values()])
    # Holm rejects the surest first: those that passed no longer count against the others.
    unsettled = sum(p >= ALPHA for p in adjusted)
    for (trial, comparison), p_holm in zip(comparisons.items(), adjusted, strict=True):
        judgement = judge(comparison, p_holm, margins, tests=max(unsettled, 1))
        entries[trial] |= {
            "accuracy_difference": {**comparison.describe(margins[0]), "p_holm": p_holm},
            "decision": judgement.decision.value,
            "needs_items": judgement.needs_items,
            "needs_items_total": judgement.needs_items_total,
            "decisive_language": judgement.language,
        }
    return result


@dataclass(frozen=True)
class Judgement:
    """A decision. language: the one that decides against the candidate (None: all pooled). needs_items: about how many
    more items of that language would decide, needs_items_total: of all, in the same mix."""

    decision: Decision
    language: str | None = None
    needs_items: int | None = None
    needs_items_total: int | None = None


def judge(comparison: Comparison, p_holm: float, margins: tuple[float, float], *, tests: int = 1) -> Judgement:
    """What the evidence says, and what it would take if it says nothing.

    p_holm: adjusted p-value that every margin is kept. margins: pooled and per language, points. tests: finalists that
    Holm's correction still counts.
    """
    languages = {name: part.difference for name, part in comparison.languages.items()}
    pooled = comparison.pooled.difference
    parts = [(None, pooled, margins[0]), *((name, part, margins[1]) for name, part in languages.items())]
    decisions = {name: decide(difference, margin, p_holm) for name, difference, margin in parts}
    if Decision.non_inferior in decisions.values():  # one p-value for all
        return Judgement(Decision.non_inferior)
    if Decision.inferior in decisions.values():
        return Judgement(Decision.inferior, next(n for n, made in decisions.items() if made is Decision.inferior))
    language = max([None, *languages], key=lambda name: comparison.language_p[name] if name else comparison.p)
    total = items_needed(pooled, margins[0], languages=languages, language_margin_points=margins[1], tests=tests)
    if total is None or language is None:
        return Judgement(Decision.undecided, language, total, total)
    share = languages[language].points.n / pooled.points.n
    return Judgement(Decision.undecided, language, round_up(math.ceil(total * share)), total)


def _turns(measured: Json) -> Json:
    """How it was measured: rounds and how many were wanted; passes, how many played again, how many still disturbed."""
    passes = [one for played in measured["conditions"] for one in played]
    return {
        "rounds": len(measured["conditions"]),
        "rounds_wanted": measured["rounds_wanted"],
        "passes": len(passes),
        "replayed": sum(one["attempts"] > 1 for one in passes),
        "disturbed": sum(not one["quiet"] for one in passes),
        "together": measured["together"],
        "why": measured["why"],
    }


def _speedup(measured: Json, trial: str, lower_is_better: bool) -> Json:
    sides = [measured["trials"][side]["rounds"] for side in (measured["reference"], trial)]
    found = rounds(*sides, first_stage=measured["rounds_first_stage"], lower_is_better=lower_is_better)
    estimate = found.estimate()
    ratios = [math.exp(ratio) for ratio in found.log_ratios]
    if isinstance(estimate, Unknown):
        return {"ratio": None, "ci95": None, "n": estimate.n, "rounds": ratios, "why": estimate.why}
    return {"ratio": estimate.value, "ci95": estimate.ci95, "n": estimate.n, "rounds": ratios, "why": None}


def _measured(row: Json, answers: pd.DataFrame | None) -> Json:
    """What is known of a confirmed trial by itself; the comparison fills in the rest."""
    score = None
    if answers is not None:
        score = accuracy(answers["correct"].astype(float).tolist(), clusters(answers), answers["task"].tolist())
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
        "needs_items_total": None,
        "decisive_language": None,
    }
