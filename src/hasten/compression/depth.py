"""Depth pruning: drop the blocks that change the residual stream least.

A block's influence is one minus the cosine between its input and its output, averaged over the
calibration text's tokens (Men et al. 2024, ShortGPT, arXiv:2403.03853). Every dropped block removes
its weight bytes, its KV cache and its latency on any engine: the one kind of pruning that needs no
special kernel. What is left may mix full and sliding layers in a pattern of its own (Gemma 3, Qwen),
which `layer_types` spells out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.config import ModelConfig
    from hasten.model.decoder import Decoder


@dataclass
class Depth(Compressor):
    """drop: how many blocks to remove."""

    drop: int = 1

    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        if self.drop < 1:
            raise UserError(f"compression.drop must be at least 1, got {self.drop}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Remove the least influential blocks. Raises `UserError` if that leaves none, or on a quantised parent."""
        from hasten.model.config_json import layer_fields

        text, model = self.given(calibration), self.network(parent)
        shape, layers, tensors = model.config, model.config.layers, parent.tensors()
        if self.drop >= layers:
            raise UserError(f"compression.drop must be below the parent's {layers} layers, got {self.drop}")
        scores = block_influence(model, text)
        dropped = sorted(sorted(range(layers), key=lambda layer: (scores[layer], layer))[: self.drop])
        kept = [layer for layer in range(layers) if layer not in dropped]
        renumber = {old: new for new, old in enumerate(kept)}
        result: dict[str, Tensor] = {}
        for name, value in tensors.items():
            match = re.match(r"(model\.layers\.)(\d+)(\..*)", name)
            if match is None:
                result[name] = value
            elif int(match[2]) in renumber:
                result[f"{match[1]}{renumber[int(match[2])]}{match[3]}"] = value
        config = {**parent.config, "num_hidden_layers": len(kept), **layer_fields(pruned(shape, kept))}
        notes = {"dropped": dropped, "influence": [round(score, 6) for score in scores]}
        return Compressed(config, result, None, notes)


def pruned(shape: ModelConfig, kept: list[int]) -> ModelConfig:
    """The shape with those layers alone."""
    types = [shape.layer_types[layer] for layer in kept] if shape.layer_types else []
    return replace(shape, layers=len(kept), layer_types=types)


def block_influence(model: Decoder, text: Calibration, batch_size: int = 8) -> list[float]:
    """1 - mean cosine(input, output) of every block over the text's tokens."""
    import torch
    import torch.nn.functional as F

    totals = torch.zeros(model.config.layers, dtype=torch.float64)

    def watch(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            lost = 1 - F.cosine_similarity(args[0].double(), output.double(), dim=-1)
            totals[layer] += lost[documents >= 0].sum()

        return model.model.layers[layer].register_forward_hook(hook)

    handles = [watch(layer) for layer in range(model.config.layers)]
    try:
        with torch.inference_mode():
            for ids, documents in zip(text.ids.split(batch_size), text.documents.split(batch_size), strict=True):
                model.model(ids, documents=documents)
    finally:
        for handle in handles:
            handle.remove()
    return [float(total) / text.tokens for total in totals]
