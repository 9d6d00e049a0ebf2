"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): weights stay, a small product beside each matrix learns.

Fine-tuning changes a matrix W (out, in) in few directions. So its change is written as alpha / rank * B A, with B
(out, rank) and A (rank, in): `rank * (out + in)` numbers instead of `out * in`, less than 1% in a model of billions. B
starts at zero, so that training starts from the base model; in the end the product is added to W, and the checkpoint is
a plain one, as fast as its base.

What it saves is memory. Full fine-tuning with Adam keeps 16 bytes per parameter: weight, gradient and two moments, in
float32. Here a frozen weight of a block takes 4, or 2 in bfloat16, as which it is kept while training if the fit
computes in bfloat16 and the weight is such a number already, as those of most published checkpoints are; gradients and
moments are the adapters' alone. What it does not save is time: gradients still flow through every block.

Try it: python pipelines/finetune.py plan=default tuning=lora tuning.rank=16
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hasten.errors import UserError, one_of
from hasten.tuning.base import Tuning

if TYPE_CHECKING:
    from hasten.model.network import Network

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a decoder's blocks."""


@dataclass
class Lora(Tuning):
    """rank: of what can be learned about a matrix. alpha: what is learned is multiplied by alpha / rank.

    targets: linear layers of the blocks, by name, that get an adapter. dropout: of what an adapter reads.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    dropout: float = 0.0

    strategies: ClassVar[tuple[str, ...]] = ("single", "ddp", "fsdp")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"tuning.rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"tuning.alpha must be above 0 and finite, got {self.alpha}")
        if not self.targets:
            raise UserError(f"tuning.targets must name at least one of {list(TARGETS)}, got none")
        if not 0 <= self.dropout < 1:
            raise UserError(f"tuning.dropout must be at least 0 and below 1, got {self.dropout}")

    def attach(self, model: Network, *, seed: int, low_precision: bool) -> None:
        import torch
        from torch import nn

        from hasten.model.adapter import Frozen, LoraLinear, placed

        linears = placed(model, nn.Linear)
        names = sorted({name for _, name, _ in linears})
        if not names:
            raise UserError("tuning must be full for a model whose blocks have no linear layers (an LSTM), got lora")
        for target in self.targets:
            if target not in names:
                raise one_of("tuning.targets", target, names)
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        scale = self.alpha / self.rank
        for parent, name, linear in linears:
            if name in self.targets:
                adapter = LoraLinear(
                    linear, low_precision, rank=self.rank, scale=scale, dropout=self.dropout, generator=generator
                )
                setattr(parent, name, adapter)
            elif low_precision:
                setattr(parent, name, Frozen(linear, low=True))

    def merge(self, model: Network) -> None:
        from hasten.model.adapter import Frozen, placed

        for parent, name, layer in placed(model, Frozen):
            setattr(parent, name, layer.merged())
        model.requires_grad_(True)
