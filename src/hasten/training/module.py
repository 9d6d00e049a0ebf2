"""The Lightning module: weighted next-token loss, warm-up and cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor

from hasten.errors import UserError
from hasten.model.network import Network
from hasten.training.data import Batch
from hasten.training.loss import weighted_loss
from hasten.training.optimiser import build_optimiser
from hasten.training.options import Training


def learning_rate_factor(step: int, steps: int, options: Training) -> float:
    """Linear warm-up, then a cosine down to the final fraction (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    warmup = max(1, round(options.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    low = options.final_learning_rate_fraction
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


class LanguageModel(lightning.LightningModule):
    """A decoder in training for `steps` optimiser steps."""

    def __init__(self, model: Network, options: Training, steps: int) -> None:
        super().__init__()
        self.model, self.options, self.steps = model, options, steps
        self.tokens_seen = 0
        self.gradient_norm = 0.0
        self._losses: list[Tensor] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = weighted_loss(self.model, batch)
        if not torch.isfinite(loss):
            rate = self.options.learning_rate
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}; lower training.learning_rate (now {rate})"
            )
        self.tokens_seen += batch["ids"].numel()
        self._losses.append(loss.detach())
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]

    def mean_loss(self) -> float:
        """The mean loss since this was last asked."""
        losses, self._losses = self._losses, []
        return float(torch.stack(losses).mean())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: Lightning's own clipping refuses fused optimisers under autocast."""
        limit = self.options.gradient_clip or math.inf
        self.gradient_norm = float(torch.nn.utils.clip_grad_norm_(self.trainable(), limit))

    def configure_optimizers(self) -> Any:
        optimiser = build_optimiser(self.model, self.options)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, self.steps, self.options)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trainable(self) -> Iterator[torch.nn.Parameter]:
        return (p for p in self.model.parameters() if p.requires_grad)
