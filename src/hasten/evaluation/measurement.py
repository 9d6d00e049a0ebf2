"""The record of a trial: `measurements/T.json`, written the same way whatever became of it.

A quantity that was not or could not be measured is null, and `why` says the reason; it is never 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from hasten.artifacts import SCHEMA, Json, Variant, read_json
from hasten.errors import UserError
from hasten.evaluation import continuation
from hasten.evaluation.latency import speed
from hasten.evaluation.memory import apart_from_kv
from hasten.evaluation.quality import agreement, by_task, pooled
from hasten.evaluation.roofline import Work, nothing, roofline
from hasten.evaluation.trial import Job, Outcome
from hasten.evaluation.worker import task_folders
from hasten.model.shape import Shape, read_shape


def measurement(
    job: Job,
    outcome: Outcome,
    *,
    machine: Json,
    build: Json | None = None,
    predicted: Json | None = None,
    ceilings: Json | str = "the machine's ceilings were not given",
    reference: tuple[str, Sequence[dict[str, Any]]] | None = None,
) -> Json:
    """Everything about a trial, as JSON.

    machine: what `probe` wrote for the job's engine. build: {seconds, tokens, peak_memory_bytes} of
    making the variant. predicted: how well the variant predicts held-out text (`bits_per_byte/V.json`).
    ceilings: what this machine can do (`hasten.ceilings`), or why that is not known. reference: the name and the
    predictions of the trial whose answers these are compared with.
    """
    variant = Variant(job.variant)
    why = dict(outcome.why)
    predicted = predicted or {"languages": {}, "why": {"bits_per_byte": "no record of it was given"}}
    if job.engine.converts:
        predicted = {
            "languages": {},
            "why": {"bits_per_byte": f"of the numbers that {job.engine.name} makes: not scored"},
        }
    why |= predicted["why"]
    continued = continuation.summary(outcome.continuations)
    if continued is None:
        why.setdefault("continuation", "no text was continued")
    apart, reason = apart_from_kv(outcome.peak_memory_bytes, outcome.memory.get("kv_cache"))
    if reason:
        why["peak_memory_apart_from_kv_bytes"] = reason
    speeds = {name: speed(job.scenarios[name], repetitions) for name, repetitions in outcome.speed.items()}
    limits = _limits(variant, outcome, speeds, ceilings)
    why |= limits.pop("why")
    if outcome.status != "ok":
        why.update(dict.fromkeys(("quality", "speed"), f"the trial {outcome.status}"))
    why |= {f"memory.{name}": "the engine does not say" for name, value in outcome.memory.items() if value is None}
    size = outcome.memory.get("weights") if job.engine.converts else variant.weight_bytes
    if not size:
        missing = f"{variant.path.name} holds no safetensors file"
        why["artifact_bytes"] = f"{job.engine.name} made none" if job.engine.converts else missing
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
        "converted": job.engine.converts,
        "lineage": variant.lineage,
        "method": variant.manifest.get("method"),
        "grid": variant.manifest.get("grid"),
        "machine": {
            **{name: machine.get(name) for name in ("id", "cpu", "gpu")},
            "threads": job.engine.thread_count,
            "libraries": machine.get("libraries"),
        },
        "options": job.engine.describe(),
        "draft": _draft(job, outcome),
        "kernel": outcome.kernel,
        "native_format": outcome.native_format,
        "artifact_bytes": size or None,
        "weight_bytes_per_token": outcome.weight_bytes_per_token,
        "kv_bytes_per_position": outcome.kv_bytes_per_position,
        "arithmetic": outcome.arithmetic,
        "affinity": outcome.affinity,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "peak_memory_apart_from_kv_bytes": apart,
        "peak_gpu_memory_bytes": outcome.peak_gpu_memory_bytes,
        "memory": outcome.memory,
        "load_seconds": outcome.load_seconds,
        "compile_seconds": outcome.compile_seconds,
        "build": build,
        "quality": _quality(job, outcome),
        "pooled": pooled(outcome.predictions),
        "agreement": agreed,
        "bits_per_byte": {name: entry["value"] for name, entry in predicted["languages"].items()} or None,
        "bits_per_byte_ci95": {name: entry["ci95"] for name, entry in predicted["languages"].items()} or None,
        "continuation": continued,
        "headline": {name: scenario.headline_figure for name, scenario in job.scenarios.items()},
        "speed": speeds,
        **limits,
        "why": why,
    }


def _draft(job: Job, outcome: Outcome) -> Json | None:
    """Which variant guessed: {variant, hash (null if there is none of that name), weight_bytes_per_guess}."""
    if (draft := job.draft) is None:
        return None
    found = draft.hash if draft.path.is_dir() else None
    return {"variant": draft.path.name, "hash": found, "weight_bytes_per_guess": outcome.weight_bytes_per_guess}


def _quality(job: Job, outcome: Outcome) -> Json:
    if not outcome.predictions:
        return {}
    manifests = {path.name: read_json(path / "manifest.json") for path in task_folders(job.tasks)}
    return by_task(outcome.predictions, manifests)


def _limits(variant: Variant, outcome: Outcome, speeds: Json, ceilings: Json | str) -> Json:
    """`ceilings`, `mbu`, `mfu`, `bound` and `roofline`, and the reasons for what is null."""
    if outcome.weight_bytes_per_token is None or outcome.kv_bytes_per_position is None or not outcome.arithmetic:
        ran = outcome.status == "ok"
        return nothing("the engine does not say what it reads" if ran else f"the trial {outcome.status}")
    if isinstance(ceilings, str):
        return nothing(ceilings)
    shape: Shape | None = None
    with contextlib.suppress(UserError):  # a family whose FLOPs the cost model does not count
        shape = read_shape(variant.config)
    work = Work(
        shape,
        outcome.weight_bytes_per_token,
        outcome.kv_bytes_per_position,
        outcome.arithmetic,
        outcome.weight_bytes_per_guess or 0,
    )
    return roofline(work, speeds, ceilings)
