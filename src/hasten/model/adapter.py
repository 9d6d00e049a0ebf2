"""Adapters: linear layers that stay as they are, with a small product beside them that trains.

    y = W x + b + scale * B A x          W (out, in) frozen, A (rank, in), B (out, rank)

What was learned is a matrix of that rank, scale * B A, so it can be added to W at last, and nothing of the adapter is
left that an engine would have to know. `hasten.tuning.lora` puts adapters in and takes them out.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.model.network import Network

Kind = TypeVar("Kind", bound=nn.Module)


class Frozen(nn.Module):
    """A linear layer that does not train. low: keep its matrix in bfloat16 if every weight fits, for half the bytes."""

    def __init__(self, linear: nn.Linear, low: bool) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.dtype = linear.weight.dtype
        narrow = linear.weight.detach().bfloat16()
        if low and torch.equal(narrow.to(self.dtype), linear.weight):
            linear.weight = nn.Parameter(narrow, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        if not torch.is_autocast_enabled(x.device.type):  # a validation: autocast would see to it
            weight = weight.to(x.dtype)
        return F.linear(x, weight, self.linear.bias)

    def merged(self) -> nn.Linear:
        """The plain layer again, in its own type."""
        self.linear.weight = nn.Parameter(self.linear.weight.to(self.dtype))
        return self.linear


class LoraLinear(Frozen):
    """With an adapter, which starts as zero: A is normal with 1 / sqrt(in), B is 0.

    dropout: of what the adapter reads; it is no `Network.set_dropout`'s business.
    """

    def __init__(
        self, linear: nn.Linear, low: bool, *, rank: int, scale: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__(linear, low)
        drawn = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        self.lora_a = nn.Parameter(drawn.to(linear.weight.device, self.dtype))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank, dtype=self.dtype))
        self.dropout, self.scale = nn.Dropout(dropout), scale

    def forward(self, x: Tensor) -> Tensor:
        beside = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)  # (..., in) -> rank -> out
        return super().forward(x) + self.scale * beside

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer with W + scale * B A. A weight to which nothing is added keeps every bit, -0 its sign."""
        plain = super().merged()
        learned = self.scale * (self.lora_b @ self.lora_a)  # (out, in)
        plain.weight.copy_(torch.where(learned == 0, plain.weight, plain.weight + learned))
        return plain


def placed(model: Network, kind: type[Kind]) -> list[tuple[nn.Module, str, Kind]]:
    """Every module of a kind within the blocks: what holds it, by which name, itself."""
    return [
        (parent, name, child)
        for block in model.blocks()
        for parent in block.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
