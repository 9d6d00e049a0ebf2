"""Width pruning: narrower layers, all alike: fewer heads, fewer feed-forward channels, a narrower residual stream.

What is narrower has fewer weight bytes to read and needs no special kernel; and unlike depth pruning it keeps the
number of steps in which a token is computed, which quality bears better for the same parameters (Muralidharan et al.
2024, Minitron, arXiv:2407.14679). What goes is told by activations on the calibration text, as there: of each row the
mean over its tokens, of all rows the root of the sum of squares. The activation is what a unit adds to the residual
stream, so that one which nobody reads counts for nothing:

    a query head          |W_O,i a_i|, the length of its part of what attention adds
    a feed-forward channel |a_j| |W_down,j|
    a hidden dimension    |norm(x)_i|, summed over the norms that read the stream

Query heads share key/value heads: `kv_heads` keeps the groups that matter most, and of each as many heads, its best.
RMSNorm divides by a mean over dimensions, which a narrower stream changes: each norm's weights are multiplied by what
that mean became on the calibration text (exactly sqrt(before / after) where the dimensions that went were zero), and a
Gemma's embedding by what sqrt(hidden size) lost. A pruned model is meant to be trained again; what it can do without is
what this method alone shows.

    python pipelines/compress.py plan=default name=slim parent=variants/baseline compression=width \\
        compression.feed_forward=0.75
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hasten.model.config import ModelConfig
    from hasten.model.decoder import Decoder

ROWS = 8
"""Calibration rows that pass the network at once."""
READERS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "norm")
"""Norms between the residual stream and what reads it; with post_norms the second of them is none."""


@dataclass
class Width(Compressor):
    """What is left of each: a share below 1 or a number; 0 leaves it as it is.

    multiple_of: what feed_forward and hidden are rounded up to a multiple of, which kernels and grids want.
    """

    heads: float = 0.0
    kv_heads: float = 0.0
    feed_forward: float = 0.75
    hidden: float = 0.0
    multiple_of: int = 64

    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "feed_forward", "hidden"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (value > 1 and value != int(value)):
                raise UserError(f"compression.{name} must be 0 (as it is), a share or a whole number, got {value}")
        if not any((self.heads, self.kv_heads, self.feed_forward, self.hidden)):
            raise UserError("compression.heads, kv_heads, feed_forward or hidden must be above 0, got 0 for all")
        if self.multiple_of < 1:
            raise UserError(f"compression.multiple_of must be at least 1, got {self.multiple_of}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Slice every matrix. Raises `UserError` on a quantised parent, or if nothing would be narrower."""
        text, model = self.given(calibration), self.network(parent)
        before = model.config
        shape, found = self.shape(before), observe(model, text)
        del model  # what is left comes from the parent's file
        kept = Kept.best(shape, before, found)
        config = {
            **parent.config,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.feed_forward_size,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_width,
        }
        tensors = narrowed(parent.stored(), shape, before, kept, found)
        return Compressed(config, tensors, None, {"importance_kept": kept.shares(found)})

    def shape(self, before: ModelConfig) -> ModelConfig:
        """What is left of a shape."""
        kv_heads = self.size("kv_heads", before.kv_heads, 1)
        grouped = kv_heads * (before.heads // before.kv_heads)
        heads = self.size("heads", before.heads, kv_heads) if self.heads else grouped
        if heads % kv_heads or heads > grouped:
            raise UserError(
                f"compression.heads must be a multiple of the {kv_heads} key/value heads that stay and at most "
                f"{grouped}, got {heads}"
            )
        sizes = {
            "heads": heads,
            "kv_heads": kv_heads,
            "feed_forward_size": self.size("feed_forward", before.feed_forward_size, self.multiple_of),
            "hidden_size": self.size("hidden", before.hidden_size, self.multiple_of),
        }
        try:
            return replace(before, **sizes, head_size=before.head_width)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"width would make a shape that no family has: {error}") from None

    def size(self, name: str, before: int, multiple_of: int) -> int:
        """What an option leaves of a size. Raises `UserError` unless it is less."""
        asked = getattr(self, name)
        if not asked:
            return before
        wanted = math.ceil(asked * before - 1e-9) if asked < 1 else int(asked)
        if asked < 1 or name in ("feed_forward", "hidden"):
            wanted = -(-wanted // multiple_of) * multiple_of
        if wanted >= before:
            raise UserError(f"compression.{name} must leave less than the parent's {before}, got {asked:g} ({wanted})")
        return wanted


@dataclass
class Found:
    """What the calibration text showed. heads: (layers, H), channels: (layers, inner), hidden: (hidden,) importances.

    energy: by norm, the sum of squares of each dimension of what it is given, (hidden,). All float64.
    """

    heads: list[Tensor]
    channels: list[Tensor]
    hidden: Tensor
    energy: dict[str, Tensor]


@dataclass
class Kept:
    """Indices that stay, in their order: of each layer's query heads, key/value heads and channels, and of hidden."""

    heads: list[list[int]]
    kv_heads: list[list[int]]
    channels: list[list[int]]
    hidden: list[int]

    @classmethod
    def best(cls, after: ModelConfig, before: ModelConfig, found: Found) -> Kept:
        groups = [grouped(scores, after, before) for scores in found.heads]
        return cls(
            [heads for heads, _ in groups],
            [kv_heads for _, kv_heads in groups],
            [top(scores, after.feed_forward_size) for scores in found.channels],
            top(found.hidden, after.hidden_size),
        )

    def inner(self, module: str, width: int) -> list[int] | None:
        """What stays of a matrix's side that is not the stream's; None for what has no such side. width: a head's."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(?:mlp|self_attn)\.(\w+)_proj", module)
        if match is None:
            return None
        if match[2] in ("gate", "up", "down"):
            return self.channels[int(match[1])]
        heads = (self.heads if match[2] in "qo" else self.kv_heads)[int(match[1])]
        return [head * width + place for head in heads for place in range(width)]

    def shares(self, found: Found) -> dict[str, float]:
        """How much of all importance stays."""

        def share(kept: Sequence[list[int]], scores: Sequence[Tensor]) -> float:
            part = sum(float(one[ids].sum()) for ids, one in zip(kept, scores, strict=True))
            whole = sum(float(one.sum()) for one in scores)
            return round(part / whole, 4) if whole else 1.0  # an untrained network's halves add nothing yet

        return {
            "heads": share(self.heads, found.heads),
            "feed_forward": share(self.channels, found.channels),
            "hidden": share([self.hidden], [found.hidden]),
        }


def top(scores: Tensor, count: int) -> list[int]:
    """The places of the largest scores, in their order; the first of equals."""
    order = sorted(range(len(scores)), key=lambda place: (-float(scores[place]), place))
    return sorted(order[:count])


def grouped(scores: Tensor, after: ModelConfig, before: ModelConfig) -> tuple[list[int], list[int]]:
    """The query and the key/value heads of a layer that stay: the best groups by what their best heads amount to."""
    size, left = before.heads // before.kv_heads, after.heads // after.kv_heads
    by_group = scores.view(before.kv_heads, size)  # (K, heads per group)
    kv_heads = top(by_group.sort(dim=1, descending=True).values[:, :left].sum(1), after.kv_heads)
    return [group * size + head for group in kv_heads for head in top(by_group[group], left)], kv_heads


def observe(model: Decoder, text: Calibration) -> Found:
    """Run the calibration text through the network and watch."""
    import torch

    config = model.config
    heads = [torch.zeros(config.heads, dtype=torch.float64) for _ in range(config.layers)]
    channels = [torch.zeros(config.feed_forward_size, dtype=torch.float64) for _ in range(config.layers)]
    norms = hidden_norms(model)
    energy, streams = ({name: torch.zeros(config.hidden_size, dtype=torch.float64) for name in norms} for _ in range(2))

    def squared(values: Tensor) -> Tensor:
        """(B, T, units) -> (units,): of each row the mean over its tokens, of that the squares."""
        means: Tensor = (values.abs().double() * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return means.square().sum(0)

    def head_hook(layer: int) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor]) -> None:
            parts = args[0].unflatten(-1, (config.heads, -1))  # (B, T, H, D)
            matrix = module.weight.unflatten(1, (config.heads, -1))  # (hidden, H, D)
            added = [(parts[:, :, head] @ matrix[:, head].T).norm(dim=-1) for head in range(config.heads)]
            heads[layer] += squared(torch.stack(added, -1))

        return hook

    def channel_hook(layer: int) -> Any:
        def hook(module: nn.Linear, args: tuple[Tensor]) -> None:
            channels[layer] += squared(args[0] * module.weight.norm(dim=0))

        return hook

    def norm_hook(name: str, reads: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            energy[name] += args[0][real].double().square().sum(0)
            if reads:
                streams[name] += squared(output)

        return hook

    handles = []
    for number, block in enumerate(model.model.layers):
        handles.append(block.get_submodule("self_attn.o_proj").register_forward_pre_hook(head_hook(number)))
        handles.append(block.get_submodule("mlp.down_proj").register_forward_pre_hook(channel_hook(number)))
    for name, module in norms.items():
        kind = name.rsplit(".", 1)[-1]
        reads = kind in READERS and not (config.post_norms and kind == "post_attention_layernorm")
        handles.append(module.register_forward_hook(norm_hook(name, reads)))
    try:
        with torch.inference_mode():
            for ids, documents in zip(text.ids.split(ROWS), text.documents.split(ROWS), strict=True):
                real = documents >= 0
                model.model(ids, documents=documents)
    finally:
        for handle in handles:
            handle.remove()
    hidden = torch.stack([one.sqrt() for one in streams.values()]).sum(0)
    return Found([one.sqrt() for one in heads], [one.sqrt() for one in channels], hidden, energy)


def hidden_norms(model: Decoder) -> dict[str, nn.Module]:
    """The norms over the residual stream's width by their tensors' names, not those of queries and keys."""
    named = model.named_modules()
    return {name: module for name, module in named if name.endswith("norm") and not name.endswith(("q_norm", "k_norm"))}


def narrowed(
    tensors: Mapping[str, Tensor], after: ModelConfig, before: ModelConfig, kept: Kept, found: Found
) -> dict[str, Tensor]:
    """A checkpoint's tensors with what stays of them, each in its own type."""
    result = {}
    for name, value in tensors.items():
        module, kind = name.rsplit(".", 1)
        inner = kept.inner(module, before.head_width)
        if module in found.energy:
            value = rescaled(value, module, after, before, kept, found)
        elif inner is None:
            value = value[:, kept.hidden] if value.dim() == 2 else value  # embedding, head; norms of a single head
        elif module.endswith(("o_proj", "down_proj")):  # into the stream
            value = value[kept.hidden] if kind == "bias" else value[kept.hidden][:, inner]
        else:
            value = value[inner] if kind == "bias" else value[inner][:, kept.hidden]
        result[name] = value.contiguous()
    if before.embedding_scale:
        grown = math.sqrt(before.hidden_size / after.hidden_size)
        embedding = result["model.embed_tokens.weight"]
        result["model.embed_tokens.weight"] = (embedding.float() * grown).to(embedding.dtype)
    return result


def rescaled(value: Tensor, module: str, after: ModelConfig, before: ModelConfig, kept: Kept, found: Found) -> Tensor:
    """A norm's weights, so that what it gives is as large as before."""
    if after.hidden_size == before.hidden_size:
        return value
    energy = found.energy[module]
    ratio = float((energy[kept.hidden].mean() / energy.mean()).sqrt())  # of what it divides by, now and before
    if module == "model.norm" and before.embedding_scale and before.tied_head:
        ratio *= math.sqrt(after.hidden_size / before.hidden_size)  # the head is the embedding, which has grown
    offset = 1 if before.offset_norms else 0
    found_weights: Tensor = ((value.float() + offset) * ratio - offset)[kept.hidden]
    return found_weights.to(value.dtype)
