"""Registered models: `hasten-<plan>-<scenario>`, the winner under the alias `champion`."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from hasten.artifacts import Json, load_checkpoint, read_json, write_json
from hasten.tracking.store import connect, uri

ALIAS = "champion"
MAX_TOKENS = 64  # of an answer, where the caller asks for no other number (`params={"max_tokens": ...}`)


def register_champions(verdict_path: Path) -> list[str]:
    """Register every scenario's champion; the names of those that are new. The same champion is not registered twice.

    A champion whose variant, or whose draft, is no longer on disk is left alone.
    """
    verdict = read_json(verdict_path)
    registered = []
    for scenario, entry in verdict["scenarios"].items():
        trial = entry["champion"]
        measurement = Path("artifacts", verdict["plan"], "measurements", f"{trial}.json")
        if trial is None or not measurement.exists():
            continue
        measured = read_json(measurement)
        needed = [measured["variant"], *([draft["variant"]] if (draft := measured.get("draft")) else [])]
        if not all(Path("artifacts", verdict["plan"], "variants", one).is_dir() for one in needed):
            continue
        name = f"hasten-{verdict['plan']}-{scenario}"
        if _register(name, verdict, entry, measured):
            registered.append(name)
    return registered


def _register(name: str, verdict: Json, entry: Json, measured: Json) -> bool:
    from mlflow.exceptions import MlflowException

    client, experiment = connect()
    folder = Path("artifacts", verdict["plan"], "variants", measured["variant"])
    identity = {"trial": measured["trial"], "variant_sha256": load_checkpoint(folder).hash}
    facts = {
        **identity,
        "engine": measured["engine"],
        "lineage": " > ".join(measured["lineage"]),
        "decision": str(entry["decision"]),
        "verdict": entry["sentence"],
    }
    try:
        current = client.get_model_version_by_alias(name, ALIAS)
    except MlflowException:
        current = None
    if current is not None and all(current.tags.get(key) == value for key, value in identity.items()):
        for key, value in facts.items():
            client.set_model_version_tag(name, current.version, key, value)
        return False
    version = _log_model(name, experiment, folder, measured)
    for key, value in facts.items():
        client.set_model_version_tag(name, version, key, value)
    client.update_model_version(name, version, description=entry["sentence"])
    client.set_registered_model_alias(name, ALIAS, version)
    return True


def _log_model(name: str, experiment: str, folder: Path, measured: Json) -> Any:
    """Log the champion as code plus its files; the new version's number."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    warnings.filterwarnings("ignore", module="mlflow")
    mlflow.set_tracking_uri(uri())
    mlflow.set_experiment(experiment_id=experiment)
    with tempfile.TemporaryDirectory() as scratch:
        engine = Path(scratch, "engine.json")
        write_json(engine, measured["options"])
        artifacts = {"variant": str(folder), "engine": str(engine)}
        if draft := measured.get("draft"):
            artifacts["draft"] = str(folder.with_name(draft["variant"]))  # it comes to lie beside the variant
        logged = mlflow.pyfunc.log_model(
            name=measured["trial"],
            python_model=str(Path(__file__).with_name("champion.py")),
            artifacts=artifacts,
            registered_model_name=name,
            signature=ModelSignature(params=ParamSchema([ParamSpec("max_tokens", "long", MAX_TOKENS)])),
            pip_requirements=["hasten"],
        )
    return logged.registered_model_version
