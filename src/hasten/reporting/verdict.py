"""The verdict: per scenario, which variant on which engine is the answer, and on what evidence.

The champion is the fastest finalist that the confirmation shows to be both clearly faster than the reference
and non-inferior to it, on a quiet machine; if there is none, the reference stays. What was not chosen is listed with
its reason, because "why not int4?" is the first thing a reader asks.

    python pipelines/report.py plan=default
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hasten.artifacts import SCHEMA, Json
from hasten.evaluation.statistics import Decision
from hasten.reporting.frontier import frontier, points

ITSELF = "the champion is the reference itself"


def verdict(
    measurements: Sequence[Json], finalists: Json, evidence: Json, *, titles: Mapping[str, str] | None = None
) -> Json:
    """`verdict.json`.

    measurements, finalists: the files of those names; evidence: what `hasten.evaluation.decision.confirmed` makes
    of the confirmation. titles: what scenarios are called in sentences, where not by their names.
    """
    machine: Json = {}
    for measured in (measurement["machine"] for measurement in measurements):
        machine |= {**measured, "libraries": (machine.get("libraries") or {}) | (measured.get("libraries") or {})}
    margins = {key: finalists[key] for key in ("margin_points", "language_margin_points")}
    result: Json = {"schema": SCHEMA, "plan": finalists["plan"], "machine": machine, **margins, "scenarios": {}}
    for name, selected in finalists["scenarios"].items():
        proof = evidence.get(name, {"trials": {}})
        entry = _scenario(selected, proof, margins)
        entry["frontier"] = [
            {
                "trial": point.trial,
                "accuracy": point.accuracy.value,
                "accuracy_ci95": point.accuracy.ci95,
                selected["headline"]: point.figure.value,
                "ci95": point.figure.ci95,
            }
            for point in frontier(points(measurements, name, entry))
        ]
        entry["sentence"] = sentence(entry, (titles or {}).get(name, name))
        result["scenarios"][name] = entry
    return result


def _scenario(selected: Json, proof: Json, margins: Json) -> Json:
    reference, trials = selected["reference"], proof["trials"]
    rejected: dict[str, str] = dict(selected["rejected"])
    entry: Json = {
        "champion": reference,
        "reference": reference,
        "headline": selected["headline"],
        "lower_is_better": selected["lower_is_better"],
        "decision": None,
        "contender": None,
        "speedup": None,
        "accuracy_difference": None,
        "needs_items": None,
        "decisive_language": None,
        "confirmed": trials,
        "turns": proof.get("turns"),
        "qualifying": selected.get("qualifying"),
        "rejected": rejected,
        "why": selected.get("why"),
    }
    if reference is None:
        return entry
    state = trials.get(reference, {"status": "failed", "error": "it was not confirmed"})
    if state["status"] != "ok":
        return entry | {"champion": None, "why": f"the reference {reference} could not be confirmed: {state['error']}"}
    entry["speedup"] = {"ratio": 1.0, "ci95": None, "n": 0, "why": ITSELF}
    entry["accuracy_difference"] = {
        **dict.fromkeys(("ci95", "p", "p_holm", "mcnemar_p")),
        "points": 0.0,
        "margin_points": margins["margin_points"],
        "n": state["accuracy"]["n"] if state["accuracy"] else 0,
        "why": ITSELF,
    }
    ranked = sorted(selected["finalists"], key=lambda trial: -_ratio(trials.get(trial)))
    reasons = {trial: shortfall(trials.get(trial), margins) for trial in ranked}
    champion = next((trial for trial in ranked if reasons[trial] is None), None)
    for trial in ranked:
        if trial != champion:
            rejected[trial] = reasons[trial] or f"non-inferior as well, but slower than {champion}"
    contender = champion or _closest(ranked, trials)
    if contender:
        keys = ("decision", "needs_items", "decisive_language")
        entry |= {"contender": contender, **{key: trials[contender][key] for key in keys}}
    else:
        entry["why"] = "no finalist was confirmed" if ranked else "no variant that may still answer right is faster"
    if champion:
        entry |= {"champion": champion, **{key: trials[champion][key] for key in ("speedup", "accuracy_difference")}}
    return entry


def shortfall(trial: Json | None, margins: Json) -> str | None:
    """Why a confirmed finalist cannot be the champion, None if it can."""
    if trial is None:
        return "it was not confirmed"
    if trial["status"] != "ok":
        return f"{trial['status']} in confirmation: {trial['error']}"
    speedup = trial["speedup"]
    if speedup["ratio"] is None:
        return f"of unknown speed-up: {speedup['why']}"
    if trial["validity"] == "noisy":
        return f"not settled: the machine was not quiet while they took turns ({times(speedup)} so far); confirm again"
    if speedup["ci95"][0] <= 1:
        return f"not clearly faster than the reference: {times(speedup)}"
    if trial["decision"] == Decision.inferior.value:
        return f"inferior{_loss(trial, margins)}"
    if trial["decision"] == Decision.undecided.value:
        return f"undecided{_loss(trial, margins)}{_more(trial)}"
    return None


def sentence(entry: Json, title: str) -> str:
    """A scenario's verdict in one sentence."""
    champion, reference, contender = entry["champion"], entry["reference"], entry["contender"]
    if entry["why"] and entry["speedup"] is None:
        return f"no verdict for {title}: {entry['why']}"
    if champion != reference:
        difference = entry["accuracy_difference"]
        noise = "" if entry["confirmed"][champion]["validity"] == "valid" else _caution(entry, champion)
        return (
            f"{spoken(champion)}: {times(entry['speedup'])} faster for {title} than {spoken(reference)}, "
            f"accuracy {entry['decision']} at {difference['margin_points']:g} points "
            f"({points_of(difference)}, {p_value(difference['p_holm'])}, n = {difference['n']:,}){noise}"
        )
    kept = f"keep the reference, {spoken(reference)}, for {title}: "
    if contender is None:
        return f"{kept}{entry['why']}"
    trial = entry["confirmed"][contender]
    speedup, sure = trial["speedup"], trial["validity"] != "noisy"
    clearly = sure and speedup["ci95"] and speedup["ci95"][0] > 1
    faster = f"{times(speedup)} faster but its accuracy is " if clearly else ""
    return f"{kept}{spoken(contender)} is {faster}{entry['rejected'][contender]}"


def spoken(trial: str) -> str:
    """`int8@llamacpp` in words."""
    variant, _, engine = trial.partition("@")
    return f"variant {variant} on engine {engine}" if engine else f"trial {trial}"


def times(speedup: Json) -> str:
    """`2.4x [2.3, 2.5]`."""
    if speedup["ratio"] is None:
        return "unknown speed-up"
    interval = f" [{speedup['ci95'][0]:.2f}, {speedup['ci95'][1]:.2f}]" if speedup["ci95"] else ""
    return f"{speedup['ratio']:.2f}x{interval}"


def points_of(difference: Json) -> str:
    """`-0.4 points [-1.0, 0.2]`."""
    point, low, high = (f"{round(x, 1) + 0.0:+.1f}" for x in (difference["points"], *difference["ci95"]))
    return f"{point} points [{low}, {high}]"


def p_value(p: float) -> str:
    """`p = 0.0123` or `p < 0.0001`."""
    return f"p = {p:.4f}" if p >= 0.0001 else "p < 0.0001"


def _ratio(trial: Json | None) -> float:
    speedup = (trial or {}).get("speedup") or {}
    return float(speedup.get("ratio") or 0.0)


def _closest(ranked: Sequence[str], trials: Json) -> str | None:
    """The finalist to speak of where none won: the one that the fewest more items would decide, else the fastest."""
    judged = [trial for trial in ranked if trials.get(trial, {}).get("decision")]
    open_ones = [trial for trial in judged if trials[trial]["decision"] == Decision.undecided.value]
    return min(open_ones or judged[:1], key=lambda trial: trials[trial]["needs_items"] or math.inf, default=None)


def _caution(entry: Json, trial: str) -> str:
    return f"; the measurement is a {entry['confirmed'][trial]['validity']}"


def _loss(trial: Json, margins: Json) -> str:
    """Where the loss that decides is, the margin there and the loss."""
    difference, language = trial["accuracy_difference"], trial["decisive_language"]
    if language is None:
        return f" at {margins['margin_points']:g} points: {points_of(difference)}"
    part = difference["per_language"][language]
    return f" in {language} at {margins['language_margin_points']:g} points: {points_of(part)}"


def _more(trial: Json) -> str:
    where = f" in {trial['decisive_language']}" if trial["decisive_language"] else ""
    return f"; about {trial['needs_items']:,} more test items{where} would decide" if trial["needs_items"] else ""
