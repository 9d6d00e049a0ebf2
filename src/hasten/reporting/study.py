"""A whole study: evidence, verdict, picture, page and metrics, from what lies on disk."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Json, read_json, replacing, write_json
from hasten.config import discover
from hasten.evaluation.comparison import flips
from hasten.evaluation.decision import confirmed
from hasten.evaluation.quality import agreement, load_predictions
from hasten.reporting import page, picture
from hasten.reporting.methods import making, screened
from hasten.reporting.metrics import metrics
from hasten.reporting.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd

ORDER = ("prepare", "pretrain", "finetune", "compress", "evaluate", "select", "confirm")
FLIP = ("task", "item_id", "language", "expected", "output_reference", "output_candidate", "change")
Facts = dict[str, tuple[dict[str, str], dict[str, float | None]]]


def scenario_titles() -> dict[str, str]:
    """What scenarios are called in sentences, by name."""
    return {name: str(vars(component)["title"]) for name, component in discover("scenario").items()}


def write_reports(
    artifacts: Path,
    reports: Path,
    measurements: Sequence[Json],
    predictions: Mapping[str, pd.DataFrame],
    plan: Mapping[str, Any],
    seed: int,
) -> tuple[Json, list[Path], Facts]:
    """Write the reports; the verdict, the files, and per trial what the table of runs should say of it."""
    finalists = read_json(artifacts / "finalists.json")
    answers = load_predictions(artifacts / "confirmation.parquet")
    evidence = confirmed(read_json(artifacts / "confirmation.json"), answers, finalists, seed=seed)
    titles = scenario_titles()
    result = verdict(measurements, finalists, evidence, titles=titles)
    agreements = agreement_with_reference(measurements, predictions)
    shown = [{**m, "agreement": agreements.get(m["trial"])} for m in measurements]
    files = [reports / name for name in ("verdict.json", "frontier.png", "report.html", "metrics.json", "flips.csv")]
    write_json(files[0], {**result, "screened": screened(measurements, making(artifacts / "runs"))})
    picture.draw(shown, result, files[1], titles=titles)
    stages = stage_seconds(artifacts / "runs", plan.get("budget_seconds", {}))
    changed = changed_answers(answers, finalists)
    page.write(shown, result, files[1], files[2], titles=titles, stages=stages, flips=changed)
    write_json(files[3], metrics(shown, result))
    write_flips(changed, files[4])
    return result, files, {m["trial"]: facts(m["trial"], result, agreements) for m in measurements}


def changed_answers(answers: pd.DataFrame, finalists: Json) -> dict[str, list[Json]]:
    """By finalist, the test items that only it or only its reference answered right."""
    found: dict[str, list[Json]] = {}
    by_trial = {} if answers.empty else {str(trial): part for trial, part in answers.groupby("trial")}
    for entry in finalists["scenarios"].values():
        for trial in entry["finalists"]:
            if trial in by_trial and entry["reference"] in by_trial:
                found[trial] = [dict(flip) for flip in flips(by_trial[trial], by_trial[entry["reference"]])]
    return found


def write_flips(changed: Mapping[str, Sequence[Json]], path: Path) -> None:
    """`flips.csv`: every changed answer of every finalist, atomically; the header alone where there is none."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["trial", *FLIP], lineterminator="\n")
        table.writeheader()
        for trial, rows in changed.items():
            table.writerows({"trial": trial, **row} for row in rows)


def agreement_with_reference(
    measurements: Sequence[Json], predictions: Mapping[str, pd.DataFrame], engine: str = "eager"
) -> dict[str, Json]:
    """Per trial, the share of items answered exactly as by the same variant on the reference engine."""
    references = {m["variant"]: m["trial"] for m in measurements if m["engine"] == engine and m["status"] == "ok"}
    found: dict[str, Json] = {}
    for measurement in measurements:
        trial, reference = measurement["trial"], references.get(measurement["variant"])
        if reference is not None and reference != trial and measurement["status"] == "ok":
            own, theirs = (predictions[name].to_dict("records") for name in (trial, reference))
            found[trial] = {"reference": reference, **agreement(own, theirs)}  # type: ignore[arg-type]
    return found


def stage_seconds(runs: Path, budgets: Mapping[str, float]) -> dict[str, Json]:
    """What each stage took and what its plan allows, from the records of the runs."""
    rows: dict[str, Json] = {}
    records = [read_json(path) for path in sorted(runs.glob("*.json"))]
    for record in sorted(
        records, key=lambda record: ORDER.index(record["stage"]) if record["stage"] in ORDER else len(ORDER)
    ):
        seconds = record["metrics"].get("seconds")
        rows[record["name"]] = {"seconds": seconds, "budget_seconds": budgets.get(record["stage"])}
    return rows


def facts(trial: str, result: Json, agreements: Mapping[str, Json]) -> tuple[dict[str, str], dict[str, float | None]]:
    """A trial's fate in every scenario, and its agreement with the reference engine."""
    tags: dict[str, str] = {}
    figures: dict[str, float | None] = {}
    for scenario, entry in result["scenarios"].items():
        if trial in entry["rejected"]:
            tags[f"{scenario}.decision"] = f"rejected: {entry['rejected'][trial]}"
        elif trial == entry["champion"]:
            kept = trial == entry["reference"]
            tags[f"{scenario}.decision"] = (
                "champion (the reference is kept)" if kept else f"champion ({entry['decision']})"
            )
            figures[f"{scenario}_speedup"] = 1.0 if kept else (entry["speedup"] or {}).get("ratio")
        elif trial == entry["reference"]:
            tags[f"{scenario}.decision"] = "reference"
            figures[f"{scenario}_speedup"] = 1.0
    if trial in agreements:
        figures["agreement_with_eager"] = agreements[trial]["share"]
    return tags, figures
