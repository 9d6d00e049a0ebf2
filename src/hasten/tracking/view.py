"""A ready-made table in the MLflow UI: a plan's trials with the columns that tell its story.

MLflow keeps shared views as tags of the experiment; a link with the view's key opens it. Nobody has
to pick a dozen columns out of two hundred first.
"""

from __future__ import annotations

import json
from pathlib import Path

from hasten.artifacts import read_json
from hasten.tracking.store import connect


def share_view(verdict_path: Path) -> str:
    """Store the view of a plan's trials; the link to it, from the UI's root."""
    verdict = read_json(verdict_path)
    client, experiment = connect()
    plan, scenarios = verdict["plan"], list(verdict["scenarios"])
    tasks = sorted(path.parent.name for path in Path("artifacts", plan, "tasks").glob("*/manifest.json"))
    columns = [f"metrics.`{name}_speedup`" for name in scenarios]
    columns += [f"metrics.`validation_accuracy{task}`" for task in ("", *(f"_{task}" for task in tasks))]
    for name in scenarios:
        figures = (verdict["scenarios"][name]["headline"], "decode_tokens_per_second")
        columns += [f"metrics.`{name}_{figure}`" for figure in figures if figure]
    columns += [f"metrics.`{name}`" for name in ("mbu", "mfu", "artifact_bytes", "agreement_with_eager")]
    columns += [
        f"tags.`{tag}`"
        for tag in ("variant", "engine", "lineage", "bound", *(f"{name}.decision" for name in scenarios))
    ]
    state = {
        "searchFilter": f"tags.plan = '{plan}' and tags.stage = 'evaluate'",
        "orderByKey": columns[0],
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
    }
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{plan}", json.dumps(state))
    return view_link(experiment, plan)


def view_link(experiment: str, plan: str) -> str:
    """Where the UI shows a plan's view."""
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={plan}"
