"""The record of a trial: `measurements/T.json`, written the same way whatever became of it.

A quantity that was not or could not be measured is null, and `why` says the reason; it is never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.artifacts import SCHEMA, Json, Variant, read_json
from hasten.evaluation.latency import speed
from hasten.evaluation.quality import agreement, by_task, pooled
from hasten.evaluation.trial import Job, Outcome
from hasten.evaluation.worker import task_folders

LATER = "not measured by this version"


def measurement(
    job: Job,
    outcome: Outcome,
    *,
    machine: Json,
    build: Json | None = None,
    reference: tuple[str, Sequence[dict[str, Any]]] | None = None,
) -> Json:
    """Everything about a trial, as JSON.

    machine: what `probe` wrote for the job's engine. build: {seconds, tokens, peak_memory_bytes} of
    making the variant. reference: the name and the predictions of the trial whose answers these are
    compared with.
    """
    variant = Variant(job.variant)
    why = dict(outcome.why)
    for name in ("bits_per_byte", "ceilings", "mbu", "mfu"):
        why[name] = LATER
    if outcome.status != "ok":
        why.update(dict.fromkeys(("quality", "speed"), f"the trial {outcome.status}"))
    why |= {f"memory.{name}": "the engine does not say" for name, value in outcome.memory.items() if value is None}
    if not variant.weight_bytes:
        why["artifact_bytes"] = f"{variant.path.name} holds no safetensors file"
    if build is None:
        why["build"] = "no record of how this variant was made was given"
    agreed = None
    if reference is None:
        why["agreement"] = "no reference predictions were given"
    elif not outcome.predictions:
        why["agreement"] = "the trial made no predictions"
    else:
        agreed = {"reference": reference[0], **agreement(outcome.predictions, reference[1])}
    return {
        "schema": SCHEMA,
        "trial": job.trial,
        "variant": variant.name,
        "engine": job.engine.name,
        "status": outcome.status,
        "error": outcome.error,
        "native": outcome.native,
        "lineage": variant.lineage,
        "method": variant.manifest.get("method"),
        "grid": variant.manifest.get("grid"),
        "machine": {
            **{name: machine.get(name) for name in ("id", "cpu", "gpu")},
            "threads": job.engine.thread_count,
            "libraries": machine.get("libraries"),
        },
        "options": job.engine.describe(),
        "kernel": outcome.kernel,
        "native_format": outcome.native_format,
        "artifact_bytes": variant.weight_bytes or None,
        "weight_bytes_per_token": outcome.weight_bytes_per_token,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "memory": outcome.memory,
        "load_seconds": outcome.load_seconds,
        "compile_seconds": outcome.compile_seconds,
        "build": build,
        "quality": _quality(job, outcome),
        "pooled": pooled(outcome.predictions),
        "agreement": agreed,
        "bits_per_byte": None,
        "headline": {name: scenario.headline_figure for name, scenario in job.scenarios.items()},
        "speed": {
            name: speed(job.scenarios[name], samples, outcome.contention.get(name), seed=job.seed)
            for name, samples in outcome.samples.items()
        },
        "ceilings": None,
        "mbu": None,
        "mfu": None,
        "why": why,
    }


def _quality(job: Job, outcome: Outcome) -> Json:
    if not outcome.predictions:
        return {}
    manifests = {path.name: read_json(path / "manifest.json") for path in task_folders(job.tasks)}
    return by_task(outcome.predictions, manifests)
