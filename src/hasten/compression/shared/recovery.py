"""Learning again what compression took: a short training on calibration rows.

A smaller network starts near the weights it should have, so hundreds of steps do where pre-training took thousands
(Muralidharan et al. 2024, arXiv:2407.14679). It learns from the tokens themselves (cross-entropy) or, where a teacher
is named, from what that one predicts (`hasten.compression.shared.distillation`). Optimiser and schedule are
training's; the loop is a plain one in one process, without Lightning: it is over in minutes, so it needs no
checkpoints of its own, and the same seed makes the same bytes on the same machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressor, ancestor
from hasten.errors import UserError
from hasten.training.options import Optimiser, Precision, Training

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hasten.model.decoder import Decoder
    from hasten.training.data import Batch
    from hasten.training.placement import Placement

PARENT = "parent"
"""As `teacher`: the parent itself."""
TRAINING = (
    "steps", "batch_size", "optimiser", "learning_rate", "warmup_fraction", "weight_decay", "gradient_clip",
    "precision", "accelerator", "threads",
)  # fmt: skip
"""Options that mean what they mean in `hasten.training.options.Training`."""
LOGGED_EVERY_STEPS = 10


class Learned(Enum):
    """Which tokens are learned. all: every one that follows another of its document. counted: those that the rows say
    count; of a task item its completion alone.
    """

    all = "all"
    counted = "counted"


@dataclass
class Learning:
    """What a training did. curves: (step, mean loss since the last point)."""

    cost: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]


@dataclass
class Recovery(Compressor):
    """teacher: a variant's name in the parent's lineage, `parent`, or nothing for plain cross-entropy.

    temperature, hidden_weight, hard_weight: of the distillation loss. learned: see `Learned`. steps of `batch_size`
    rows; they come up in an order of the seed, each once before any comes again. The rest is training's.
    """

    teacher: str = ""
    temperature: float = 1.0
    hidden_weight: float = 0.0
    hard_weight: float = 0.0
    learned: Learned = Learned.counted
    steps: int = 200
    batch_size: int = 16
    optimiser: Optimiser = Optimiser.muon
    learning_rate: float = 2e-3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    precision: Precision = Precision.auto
    accelerator: str = "auto"
    threads: int = 0

    needs: ClassVar[str] = "training"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"compression.steps must be at least 1, got {self.steps}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"compression.temperature must be above 0 and finite, got {self.temperature}")
        for name in ("hidden_weight", "hard_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"compression.{name} must be 0 or more and finite, got {getattr(self, name)}")
        self.training()

    def training(self) -> Training:
        """The options as training knows them. Raises `UserError` for those that it refuses."""
        with speaking_of_compression():
            return Training(**{name: getattr(self, name) for name in TRAINING})

    def placement(self) -> Placement:
        """Where it runs. Raises `UserError` for what this machine does not have."""
        from hasten.training.placement import place

        with speaking_of_compression():
            return place(self.training())

    def loss(self, student: Decoder, parent: Checkpoint, device: torch.device) -> Callable[[Batch], Tensor]:
        """The loss of a batch. Raises `UserError` if the teacher is no ancestor or cannot teach this student."""
        from hasten.compression.shared.distillation import Distillation, matching
        from hasten.training.loss import weighted_loss

        if not self.teacher:
            return lambda batch: weighted_loss(student, batch)
        known = parent if self.teacher == PARENT else ancestor(parent, self.teacher, "compression.teacher")
        return Distillation(
            student,
            self.network(known).requires_grad_(False).to(device),
            matching(parent, known) if self.hidden_weight else [],
            temperature=self.temperature,
            hidden_weight=self.hidden_weight,
            hard_weight=self.hard_weight,
        )

    def train(self, student: Decoder, parent: Checkpoint, calibration: Calibration, seed: int) -> Learning:
        """Take the steps, in place. Raises `UserError` for a loss that is not finite."""
        import torch

        from hasten.hardware import keep_freed_memory
        from hasten.training.optimiser import build_optimiser, learning_rate_factor
        from hasten.training.sharding import clip

        options, placement = self.training(), self.placement()
        device = torch.device(placement.accelerator)
        loss = self.loss(student.to(device), parent, device)
        keep_freed_memory()
        torch.set_num_threads(placement.threads)
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        optimiser = build_optimiser(student, options)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, self.steps, options)
        )
        tokens, losses, curve = 0, [], []
        with progress(self.name, self.steps) as advance:
            for step, batch in enumerate(self.batches(calibration, seed), start=1):
                tokens += int((batch["documents"] >= 0).sum())
                batch = {name: value.to(device) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=placement.low):
                    value = loss(batch)
                optimiser.zero_grad()
                value.backward()
                norm = clip(weights, self.gradient_clip or math.inf)
                losses.append(value.item())
                if not math.isfinite(losses[-1]) or not math.isfinite(norm):
                    raise UserError(
                        f"{self.name}: the loss is {losses[-1]} and the gradient {norm.item()} at step {step}; lower "
                        f"compression.learning_rate (now {self.learning_rate})"
                    )
                optimiser.step()
                schedule.step()
                if step % LOGGED_EVERY_STEPS == 0 or step in (1, self.steps):
                    curve.append((step, round(fmean(losses), 6)))
                    losses = []
                advance(curve[-1][1])
        student.cpu()
        return Learning({"build_steps": float(self.steps), "build_tokens": float(tokens)}, {"loss": curve})

    def batches(self, calibration: Calibration, seed: int) -> Iterator[Batch]:
        """What each step sees; `total` is at least 1, so that a step in which nothing counts is worth nothing."""
        import numpy as np
        import torch

        from hasten.training.sampling import Mixture

        documents, weights = calibration.documents, calibration.weights
        if self.learned is Learned.all:
            follows = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
            weights = torch.nn.functional.pad(follows.float(), (1, 0))
        order = Mixture([len(documents)], [1.0], seed)
        for step in range(self.steps):
            rows = torch.from_numpy(order.item(step * self.batch_size + np.arange(self.batch_size))[1])
            yield {
                "ids": calibration.ids[rows],
                "documents": documents[rows],
                "weights": weights[rows],
                "prompt_tokens": torch.ones(len(rows), dtype=torch.int64),
                "total": weights[rows][:, 1:].sum().clamp(min=1),
            }


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal that moves by a step and shows its loss."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, refresh_per_second=2) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda loss: bar.update(task, advance=1, description=f"{title} loss {loss:.3f}")


@contextmanager
def speaking_of_compression() -> Iterator[None]:
    """What training and tuning refuse, in the words of a method's config."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\b(training|tuning)\.", "compression.", str(error))) from None
