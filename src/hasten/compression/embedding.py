"""Quantised embeddings: the table of tokens becomes integers, as the matrices have before.

Quantisers leave the embedding in float, since decoding a token reads one row of it. But it is there, on disk and in
memory: 168 of the 268 million weights of Gemma 3 270M, four bytes each beside half a byte of all the others. Rounded to
nearest.

A parent that left its tied head in float (`head=false`) gets it back on the same integers, still tied: one table serves
both, and decoding reads it at 8 bits. Otherwise the head has integers of its own, which stay as they are.

    variants: {int4: {parent: variants/baseline, method: rtn, set: "compression.bits=4 compression.head=false"},
               int4-embedding: {parent: variants/int4, method: embedding, set: ""}}

`llamacpp` and `native` read it as it is, `eager` dequantises it as all else; the other engines refuse it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.compression.shared.quantiser import Scale, check_grid, chosen_scale, on_grid
from hasten.errors import UserError


@dataclass
class Embedding(Compressor):
    """bits: 4 or 8. group_size: weights that share a scale, 0 means a whole row. scale: as for `rtn`."""

    bits: int = 8
    group_size: int = 32
    scale: Scale = Scale.nearest

    grids: ClassVar[str] = "4 or 8 bits for the embedding, any group size that divides it; else its parent's"

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size)

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise the embedding. Raises `UserError` on a float parent, or one whose embedding is integers already."""
        from hasten.model.grid import Grid, Grids, grid_of, quantise, quantised_names
        from hasten.model.huggingface import EMBEDDING

        tensors, before = parent.tensors(), grid_of(parent)
        if before is None:
            raise UserError(f"embedding needs a quantised parent, got {parent.path} which is float; quantise it first")
        if any(kind.type == "float" for kind in before.kinds):
            raise UserError(f"embedding needs a parent of integers, got {parent.path} which is 8-bit floats")
        if EMBEDDING not in tensors:
            raise UserError(f"embedding needs a float embedding, got {parent.path} whose embedding is quantised")
        grid, weight = Grid(self.bits, self.group_size), tensors[EMBEDDING].float()
        scale = chosen_scale(weight, grid, self.scale)
        others = {name: before.of(name) for name in quantised_names(tensors)}
        grids = Grids({EMBEDDING.removesuffix(".weight"): grid, **others})
        return on_grid(grids, parent.config, tensors, {EMBEDDING: (quantise(weight, scale, grid), scale)}, {})
