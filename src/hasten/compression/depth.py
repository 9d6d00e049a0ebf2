"""Depth pruning: drop the blocks that a network can best do without.

By `influence`, those that change the residual stream least: one minus the cosine between a block's input and its
output, averaged over the calibration text's tokens (Men et al. 2024, ShortGPT, arXiv:2403.03853). By `perplexity`, one
after another the block without which that text's loss rises least, so that blocks which only stand in for each other do
not all go (Song et al. 2024, SLEB, arXiv:2402.09025): a pass over the text for each block that is left, each time.

Every dropped block removes its weight bytes, its KV cache and its latency on any engine: the one kind of pruning that
needs no special kernel. What is left may mix full and sliding layers in a pattern of its own (Gemma 3, Qwen), which
`layer_types` spells out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.config import ModelConfig
    from hasten.model.decoder import Decoder

CRITERIA = ("influence", "perplexity")


@dataclass
class Depth(Compressor):
    """drop: how many blocks to remove. criterion: `influence` or `perplexity`."""

    drop: int = 1
    criterion: str = "influence"

    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        if self.drop < 1:
            raise UserError(f"compression.drop must be at least 1, got {self.drop}")
        if self.criterion not in CRITERIA:
            raise one_of("compression.criterion", self.criterion, list(CRITERIA))

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Remove blocks. Raises `UserError` if that leaves none, or on a quantised parent."""
        from hasten.model.config_json import layer_fields

        text, model = self.given(calibration), self.network(parent)
        shape, layers, tensors = model.config, model.config.layers, parent.tensors()
        if self.drop >= layers:
            raise UserError(f"compression.drop must be below the parent's {layers} layers, got {self.drop}")
        if self.criterion == "influence":
            scores = block_influence(model, text)
            order = sorted(range(layers), key=lambda layer: (scores[layer], layer))[: self.drop]
            notes = {"influence": [round(score, 6) for score in scores]}
        else:
            order, losses = least_missed(model, text, self.drop)
            notes = {"loss": [round(loss, 6) for loss in losses]}
        dropped = sorted(order)
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
        return Compressed(config, result, None, {"dropped": dropped, **notes})


def pruned(shape: ModelConfig, kept: list[int]) -> ModelConfig:
    """The shape with those layers alone."""
    types = [shape.layer_types[layer] for layer in kept] if shape.layer_types else []
    return replace(shape, layers=len(kept), layer_types=types)


def least_missed(model: Decoder, text: Calibration, drop: int) -> tuple[list[int], list[float]]:
    """Blocks in the order in which they go, and the loss before and after each."""
    left = list(range(model.config.layers))
    order, losses = [], [text_loss(model, text, left)]
    for _ in range(drop):
        without = {layer: text_loss(model, text, [one for one in left if one != layer]) for layer in left}
        order.append(min(without, key=lambda layer: (without[layer], layer)))
        losses.append(without[order[-1]])
        left.remove(order[-1])
    return order, losses


def text_loss(model: Decoder, text: Calibration, layers: Sequence[int], batch_size: int = 8) -> float:
    """Nats per token that counts, through those layers alone."""
    import torch
    import torch.nn.functional as F

    total, stack = 0.0, model.model
    with torch.inference_mode():
        for ids, documents, weights in zip(
            *(values.split(batch_size) for values in (text.ids, text.documents, text.weights)), strict=True
        ):
            views = {slides: stack.view(ids, 0, None, slides, documents) for slides in set(stack.slides)}
            x = stack.embed(ids)
            for layer in layers:
                x = stack.layers[layer](x, views[stack.slides[layer]], None)
            counts = weights[:, 1:] > 0
            logits = model.lm_head(stack.norm(x)[:, :-1][counts]).float()  # (n, V)
            losses = F.cross_entropy(logits, ids[:, 1:][counts], reduction="none")
            total += float((losses.double() * weights[:, 1:][counts]).sum())
    return total / float(text.weights.sum())


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
