"""The Lightning module: weighted next-token loss, warm-up and cosine, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hasten.errors import TogetherError
from hasten.model.network import Network
from hasten.training.data import Batch, Share
from hasten.training.feed import Feed
from hasten.training.loss import weighted_loss
from hasten.training.optimiser import build_optimiser, learning_rate_factor
from hasten.training.options import Training
from hasten.training.placement import Placement
from hasten.training.sharding import DATA, TENSOR, clip, shard, split

Batches = Callable[[Share], "Dataset[Batch]"]
"""The passes of a fit, as the process with that share sees them."""


def draws_of(seed: int, index: int, rank: int) -> int:
    """The seed of what pass `index` draws (dropout) in a process that sees share `rank` of the sequences."""
    return int(np.random.SeedSequence((seed, 2, index, rank)).generate_state(1, np.uint64)[0])


class LanguageModel(lightning.LightningModule):
    """A network in training for `steps` optimiser steps."""

    strict_loading = False  # a file holds what trains; what is frozen comes from the base model

    def __init__(
        self, model: Network, batches: Batches, options: Training, placement: Placement, *, steps: int, seed: int
    ) -> None:
        super().__init__()
        self.model, self.batches, self.options, self.placement = model, batches, options, placement
        self.steps, self.seed = steps, seed
        self.tokens_seen = 0
        self._norm = torch.zeros(())
        self._losses: list[Tensor] = []
        self._arranged = False

    def configure_model(self) -> None:
        """Spread the weights over processes and compile the blocks. Lightning calls it twice."""
        if self._arranged:
            return
        self._arranged = True
        torch.set_num_threads(self.placement.threads)  # Lightning's launcher set them as it thinks best
        if self.placement.tensor > 1:
            split(self.model, self.device_mesh[TENSOR])
        if self.options.compile:
            for block in self.model.blocks():
                block.compile()
        if self.placement.sharded and (self.placement.data > 1 or self.placement.tensor == 1):
            shard(self.model, self.device_mesh[DATA])

    def train_dataloader(self) -> Feed:
        share = self.placement.share(self.global_rank, self.options.accumulate)
        return Feed(self.batches(share), self.options.workers)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """What a pass draws depends on its place alone, so that it does not matter what was drawn before."""
        torch.manual_seed(draws_of(self.seed, batch_idx, self.global_rank // self.placement.tensor))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The pass's part of the step's loss, times the number of parts: they are averaged afterwards."""
        loss = weighted_loss(self.model, batch) * (self.placement.data * self.options.accumulate)
        self.tokens_seen += batch["ids"].numel() * self.placement.data
        self._losses.append(loss.detach())
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_seen"] = self.tokens_seen
        if not self.placement.sharded:
            weights = self.named_parameters(remove_duplicate=False)
            frozen = {name for name, weight in weights if not weight.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]

    def mean_loss(self) -> float:
        """The mean loss of a step since this was last asked, over all processes, which all have to ask."""
        losses, self._losses = self._losses, []
        return float(self.trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean"))

    @property
    def gradient_norm(self) -> float:
        """Of the last step, before it was clipped."""
        return float(self._norm)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: Lightning's own clipping refuses fused optimisers under autocast, and sharded weights."""
        self._norm = clip(self.trainable(), self.options.gradient_clip or math.inf)
        self.refuse_infinite()

    def refuse_infinite(self) -> None:
        """Raises `TogetherError` in all processes at once: the norm is that of the whole gradient."""
        if not torch.isfinite(self._norm):
            raise TogetherError(
                f"the loss is {self._losses[-1].item()} and the gradient {self._norm.item()} at step "
                f"{self.global_step}; lower training.learning_rate (now {self.options.learning_rate})"
            )

    def configure_optimizers(self) -> Any:
        optimiser = build_optimiser(self.model, self.options)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, self.steps, self.options)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trainable(self) -> list[nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]
