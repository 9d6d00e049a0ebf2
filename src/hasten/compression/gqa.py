"""Grouped queries: key/value heads that neighbouring queries share, each the mean of several.

A KV cache holds keys and values of every key/value head, and decoding a long context reads all of it for each token:
with a quarter of the heads it is a quarter as large. Ainslie et al. (2023, arXiv:2305.13245) turn a trained network's
heads into fewer by taking the mean of their matrices, group by group, and train on for a twentieth of the steps; this
is the first half alone, which the network needs to be trained after. One head left is multi-query attention (Shazeer
2019, arXiv:1911.02150). To drop heads instead of merging them: `width`.

    python pipelines/compress.py plan=default name=shared parent=variants/baseline compression=gqa \\
        compression.kv_heads=1
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError


@dataclass
class Gqa(Compressor):
    """kv_heads: how many are left."""

    kv_heads: int = 1

    def __post_init__(self) -> None:
        if self.kv_heads < 1:
            raise UserError(f"compression.kv_heads must be at least 1, got {self.kv_heads}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Merge heads. Raises `UserError` on a quantised parent, or if its heads do not divide into fewer."""
        shape, tensors = self.network(parent).config, parent.tensors()
        if self.kv_heads >= shape.kv_heads or shape.kv_heads % self.kv_heads:
            raise UserError(
                f"compression.kv_heads must divide the parent's {shape.kv_heads} and be less, got {self.kv_heads}"
            )
        for name, value in tensors.items():
            if ".k_proj." in name or ".v_proj." in name:
                heads = value.double().view(
                    self.kv_heads, -1, shape.head_width, *value.shape[1:]
                )  # (K', merged, D, ..)
                tensors[name] = heads.mean(1).to(value.dtype).flatten(0, 1)
        return Compressed({**parent.config, "num_key_value_heads": self.kv_heads}, tensors)
