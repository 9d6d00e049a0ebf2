"""How to train: the options both fits share (`training:` in conf/pretrain.yaml and conf/finetune.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hasten.errors import UserError


class Precision(Enum):
    """`auto` takes bfloat16 autocast where the hardware computes it, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Optimiser(Enum):
    """What turns gradients into steps (`hasten.training.optimiser`)."""

    muon = "muon"
    adamw = "adamw"


@dataclass
class Training:
    """Steps, not minutes, so that the same seed gives the same weights.

    steps: optimiser steps; 0 means `epochs` passes over the data instead. batch_size: sequences in
    one forward pass; accumulate: passes per step. sequence_length: tokens (pre-training).
    validation_tokens: the most held-out tokens that one validation scores.
    learning_rate rises over warmup_fraction of the steps, then falls along a cosine to
    final_learning_rate_fraction of itself. gradient_clip: largest gradient norm (0: none).
    threads: CPU threads (0: all cores). accelerator: auto, cpu or cuda.
    """

    steps: int = 500
    epochs: int = 0
    batch_size: int = 16
    accumulate: int = 1
    sequence_length: int = 256
    optimiser: Optimiser = Optimiser.muon
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    final_learning_rate_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    precision: Precision = Precision.auto
    accelerator: str = "auto"
    threads: int = 0
    validate_every_steps: int = 200
    validation_tokens: int = 65536
    checkpoint_every_steps: int = 100
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise UserError(
                f"training needs either steps or epochs above 0, got steps={self.steps} and epochs={self.epochs}"
            )
        every = ("validate_every_steps", "checkpoint_every_steps", "log_every_steps")
        for name in ("batch_size", "accumulate", "validation_tokens", *every):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise UserError(f"training.sequence_length must be at least 2, got {self.sequence_length}")
        if not 0 < self.learning_rate < 10:
            raise UserError(f"training.learning_rate must lie between 0 and 10, got {self.learning_rate}")
        for name in ("warmup_fraction", "final_learning_rate_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"training.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.threads <= 4096:
            raise UserError(f"training.threads must be 0 (all cores) to 4096, got {self.threads}")
        if self.gradient_clip < 0 or self.weight_decay < 0:
            raise UserError("training.gradient_clip and training.weight_decay must be 0 or more")
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise UserError(f"training.accelerator must be auto, cpu or cuda, got {self.accelerator!r}")
