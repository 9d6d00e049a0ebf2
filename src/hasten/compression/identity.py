"""The float baseline: its parent, unchanged, as a variant like every other."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor


@dataclass
class Identity(Compressor):
    """Nothing to set."""

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """The parent's own tensors."""
        from hasten.model.grid import grid_of

        return Compressed(parent.config, parent.tensors(), grid_of(parent))
