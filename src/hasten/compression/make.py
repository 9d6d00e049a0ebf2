"""Run a method on a parent and write the variant: the part every method shares."""

from __future__ import annotations

import time
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from hasten.artifacts import Checkpoint, Variant, replacing
from hasten.compression.base import Calibration, Compressor
from hasten.errors import UserError
from hasten.peak import peak_bytes, reset_peak, return_freed_memory


def make_variant(
    method: Compressor, parent: Checkpoint, calibration: Calibration | None, *, name: str, target: Path, seed: int
) -> tuple[Variant, dict[str, float]]:
    """Compress `parent` and write the variant to `target`; the variant and what making it cost: seconds (without
    writing), tokens, and the most memory that the process held meanwhile, what it held before included.

    Raises `UserError` if the method refuses, or if what it made holds NaN or infinite values.
    """
    from hasten.model.huggingface import finite, save_checkpoint

    return_freed_memory()
    reset_peak()
    start = time.perf_counter()
    made = method.compress(parent, calibration, seed)
    seconds = time.perf_counter() - start
    for tensor, value in made.tensors.items():
        if not finite(value):
            raise UserError(f"{method.name} made NaN or infinite values in {tensor} of variant {name}")
    lineage = parent.lineage if isinstance(parent, Variant) else []
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    options: dict[str, Any] = {key: value.name if isinstance(value, Enum) else value for key, value in values.items()}
    manifest = {
        "kind": "variant",
        "name": name,
        "method": method.name,
        "options": options,
        "lineage": [*lineage, name],
        "parent": parent.hash,
        "grid": made.grid.describe() if made.grid else None,
        "calibration": calibration.source if calibration else None,
        "calibration_sha256": calibration.hash if calibration else None,
        "notes": made.notes,
        "curves": made.curves,
    }
    with replacing(target) as folder:
        save_checkpoint(folder, made.config, made.tensors, parent.path, manifest, made.files)
    peak, _ = peak_bytes()
    cost = {
        "build_seconds": seconds,
        "build_tokens": float(calibration.tokens) if calibration else 0.0,
        **({} if peak is None else {"build_peak_memory_bytes": float(peak)}),
        **made.cost,
    }
    return Variant(target), cost
