"""Run a method on a parent and write the variant: the part every method shares."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hasten.artifacts import Checkpoint, Tokens, Variant, replacing
from hasten.compression.base import Calibration, Compressor
from hasten.errors import UserError


@dataclass
class Calibrate:
    """Text for methods that look at activations: sequences of that length, drawn from the training split."""

    sequences: int = 32
    length: int = 128

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UserError(f"calibration.sequences must be at least 1, got {self.sequences}")
        if self.length < 2:
            raise UserError(f"calibration.length must be at least 2, got {self.length}")


def calibrated(method: Compressor, tokens: Path, options: Calibrate, seed: int) -> Calibration | None:
    """Calibration text from the plan's tokens, if the method needs any."""
    return None if method.needs == "nothing" else draw_calibration(Tokens(tokens), options, seed)


def draw_calibration(tokens: Tokens, options: Calibrate, seed: int) -> Calibration:
    """Slices of the training split at random places: ids (sequences, length)."""
    import numpy as np
    import torch

    ids = tokens.ids("train")
    if len(ids) < options.length:
        raise UserError(f"calibration.length must fit the training split ({len(ids)} tokens), got {options.length}")
    starts = np.random.default_rng(seed).integers(0, len(ids) - options.length + 1, size=options.sequences)
    rows = np.stack([ids[start : start + options.length] for start in starts]).astype(np.int64)
    return Calibration(torch.from_numpy(rows), f"{options.sequences} x {options.length} tokens of the training split")


def make_variant(
    method: Compressor, parent: Checkpoint, calibration: Calibration | None, *, name: str, target: Path, seed: int
) -> tuple[Variant, dict[str, float]]:
    """Compress `parent` and write the variant to `target`; the variant and what making it cost.

    Raises `UserError` if the method refuses, or if what it made holds NaN or infinite values.
    """
    import torch

    from hasten.model.huggingface import save_checkpoint

    start = time.perf_counter()
    made = method.compress(parent, calibration, seed)
    seconds = time.perf_counter() - start
    for tensor, value in made.tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{method.name} made NaN or infinite values in {tensor} of variant {name}")
    lineage = parent.lineage if isinstance(parent, Variant) else []
    options: dict[str, Any] = {field.name: getattr(method, field.name) for field in fields(method)}
    manifest = {
        "kind": "variant",
        "name": name,
        "method": method.name,
        "options": options,
        "lineage": [*lineage, name],
        "parent": parent.hash,
        "grid": made.grid.describe() if made.grid else None,
        "calibration": calibration.source if calibration else None,
        "notes": made.notes,
    }
    with replacing(target) as folder:
        save_checkpoint(folder, made.config, made.tensors, parent.path, manifest)
    cost = {
        "build_seconds": seconds,
        "build_tokens": float(calibration.ids.numel()) if calibration else 0.0,
        "build_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }
    return Variant(target), cost
