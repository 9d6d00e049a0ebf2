"""How to train: the options both fits share (`training:` in conf/pretrain.yaml and conf/finetune.yaml)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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


class Strategy(Enum):
    """How several processes share a fit (`hasten.training.placement`).

    single: one process. ddp: each holds the whole model and a part of the batch (Li et al. 2020, arXiv:2006.15704).
    fsdp: as ddp, but each holds a part of every weight, gradient and moment (Zhao et al. 2023, arXiv:2304.11277).
    tensor_parallel: each computes a part of every matrix product on the same batch (Shoeybi et al. 2019,
    arXiv:1909.08053). hybrid: groups of tensor_parallel that relate to each other as in fsdp.
    """

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    tensor_parallel = "tensor_parallel"
    hybrid = "hybrid"


PLACEMENT = (
    "strategy",
    "processes",
    "nodes",
    "tensor_parallel",
    "accelerator",
    "threads",
    "workers",
    "activation_checkpointing",
    "compile",
    "log_every_steps",
    "checkpoint_every_steps",
)
"""Options that say where and how a fit runs, not what it computes: a fit goes on from its running checkpoint although
they changed."""


@dataclass
class Training:
    """Steps, not minutes, so that the same seed gives the same weights.

    What is computed. steps: optimiser steps; 0 means `epochs` passes over the data instead. batch_size: sequences of
    one step, over all processes. accumulate: forward passes that a step is cut into, to save memory. sequence_length:
    tokens (pre-training, and packed fine-tuning). documents_apart: no token attends to another document than its own.
    mixture: how often the tokens of a group are seen, relative to a group that is not named (1); groups are sources,
    languages, source/language, and for tasks their names; 0 leaves a group out. packing: several items in a row of
    sequence_length tokens (fine-tuning), apart from each other. dropout: of what each half of a block adds.
    learning_rate rises over warmup_fraction of the steps, then falls along a cosine to
    final_learning_rate_fraction of itself. gradient_clip: largest gradient norm (0: none).
    validation_tokens: the most held-out tokens that one validation scores. patience: stop after that many validations
    without a better score and export the best weights (0: never). sample_prompts, sample_tokens: what a validation lets
    the model write.

    Where. strategy: see `Strategy`. processes: over all nodes (0: one for `single`, else one for every device). nodes:
    machines. tensor_parallel: processes that share a matrix (`hybrid`). accelerator: auto, cpu or cuda. threads: CPU
    threads of a process (0: its share of the cores). workers: processes that read ahead, for each training process.
    activation_checkpointing: keep a block's input alone and compute the block twice. compile: blocks through
    torch.compile.
    """

    steps: int = 500
    epochs: int = 0
    batch_size: int = 16
    accumulate: int = 1
    sequence_length: int = 256
    documents_apart: bool = True
    mixture: dict[str, float] = field(default_factory=dict)
    packing: bool = False
    dropout: float = 0.0
    optimiser: Optimiser = Optimiser.muon
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    final_learning_rate_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clip: float = 1.0
    precision: Precision = Precision.auto
    strategy: Strategy = Strategy.single
    processes: int = 0
    nodes: int = 1
    tensor_parallel: int = 0
    accelerator: str = "auto"
    threads: int = 0
    workers: int = 0
    activation_checkpointing: bool = False
    compile: bool = False
    validate_every_steps: int = 200
    validation_tokens: int = 65536
    patience: int = 0
    sample_prompts: int = 2
    sample_tokens: int = 32
    checkpoint_every_steps: int = 100
    log_every_steps: int = 10

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise UserError(
                f"training needs either steps or epochs above 0, got steps={self.steps} and epochs={self.epochs}"
            )
        every = ("validate_every_steps", "checkpoint_every_steps", "log_every_steps")
        for name in ("batch_size", "accumulate", "validation_tokens", "nodes", "sample_tokens", *every):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("processes", "tensor_parallel", "workers", "patience", "sample_prompts"):
            if getattr(self, name) < 0:
                raise UserError(f"training.{name} must be 0 or more, got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise UserError(f"training.sequence_length must be at least 2, got {self.sequence_length}")
        if not 0 < self.learning_rate < 10:
            raise UserError(f"training.learning_rate must lie between 0 and 10, got {self.learning_rate}")
        for name in ("warmup_fraction", "final_learning_rate_fraction", "beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"training.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.threads <= 4096:
            raise UserError(f"training.threads must be 0 (all cores) to 4096, got {self.threads}")
        for name in ("gradient_clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training.{name} must be 0 or more and finite, got {getattr(self, name)}")
        for group, weight in self.mixture.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"training.mixture.{group} must be 0 or more and finite, got {weight}")
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise UserError(f"training.accelerator must be auto, cpu or cuda, got {self.accelerator!r}")
