"""What a fit shows while it runs: progress, curves, validation, samples of its writing; and whether it has had enough.

A curve has a point for every logging interval. Two of them say how well the machine is used: `tokens_per_second`, over
all processes and without the time of validations, and `mfu`, model FLOPs utilisation (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B): the FLOPs that the model's arithmetic needs for these tokens, as a share of those that
the machine was measured to do. Recomputed activations are no need of the model and do not count.

The first process alone speaks; all of them validate, since where weights are shared out none can do so alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import lightning
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hasten.errors import TogetherError
from hasten.model.network import Network
from hasten.training.options import Training
from hasten.training.review import Story

REFRESHED_PER_SECOND = 2  # drawing a progress bar takes milliseconds, and from a core that trains
Validate = Callable[[Network], dict[str, float]]
"""The figures of a model on held-out data; all processes call it at the same time."""

Samples = Callable[[Network], str | None]
"""What a model writes, as Markdown."""


class Metrics(Protocol):
    """Where curves and texts go."""

    def metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None: ...

    def text(self, name: str, content: str) -> None: ...

    def describe(self, markdown: str) -> None: ...


class Trained(Protocol):
    """What is watched: a `LanguageModel`. tokens_seen: by all processes; mean_loss: since it was last asked, by all."""

    model: Network
    tokens_seen: int

    @property
    def gradient_norm(self) -> float: ...

    def mean_loss(self) -> float: ...

    def eval(self) -> Any: ...

    def train(self) -> Any: ...


def score(figures: Mapping[str, float]) -> float | None:
    """What early stopping goes by, more is better: the mean accuracy over tasks, else the validation loss; None without
    either.
    """
    accuracies = [value for name, value in figures.items() if name.startswith("accuracy_")]
    if accuracies:
        return statistics.fmean(accuracies)
    return -figures["validation_loss"] if "validation_loss" in figures else None


class Watch(Callback):
    """Progress, curves and validation. One line per ten logging intervals where there is no terminal.

    validation: the last figures. best, best_step: those of the validation with the best score, and where it was. stale:
    validations since then. first_step: where this execution began.
    """

    def __init__(
        self,
        options: Training,
        *,
        steps: int,
        validate: Validate,
        samples: Samples | None,
        keep_best: Callable[[], None],
        metrics: Metrics,
        title: str,
        flops_per_token: float,
        matmul_flops_per_second: float | None,
    ) -> None:
        """keep_best: called in all processes when the score got better and `patience` is set. flops_per_token: of
        training. matmul_flops_per_second: what all processes can do together, None if nobody measured it.
        """
        self.options, self.steps, self.title = options, steps, title
        self.validate, self.samples, self.keep_best, self.metrics = validate, samples, keep_best, metrics
        self.flops_per_token, self.matmul_flops_per_second = flops_per_token, matmul_flops_per_second
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.first_step = self.step = self.tokens = 0
        self.validation: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.validated_step = self.best_step = self.stale = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.rates: list[float] = []
        self.memory_bytes = 0

    @property
    def stopped(self) -> bool:
        """Whether there were as many validations without a better score as there is patience."""
        return 0 < self.options.patience <= self.stale

    @property
    def exported(self) -> dict[str, float]:
        """The figures of the weights that are kept: the best ones' with `patience`, else the last ones'."""
        return self.best if self.keeps_best else self.validation

    @property
    def keeps_best(self) -> bool:
        """Whether `keep_best` was ever called, here or before the fit was resumed."""
        return self.options.patience > 0 and bool(self.best)

    def on_train_start(self, trainer: lightning.Trainer, module: Trained) -> None:
        self.first_step = self.step = trainer.global_step
        self.tokens = module.tokens_seen
        self.mark = (time.perf_counter(), module.tokens_seen)
        trainer.should_stop = self.stopped  # a fit that was killed after it had had enough
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            clocks = (TimeElapsedColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, *clocks, console=self.console, refresh_per_second=REFRESHED_PER_SECOND)
            self.progress.start()
            self.bar = self.progress.add_task(self.title, total=self.steps, completed=self.first_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Trained, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.options.accumulate:
            return
        step = self.step = trainer.global_step
        self.tokens = module.tokens_seen
        if step % self.options.log_every_steps == 0 or step == self.steps:
            self.log_step(trainer, module, step)
        if step % self.options.validate_every_steps == 0 or step == self.steps:
            self.log_validation(trainer, module, step)

    def log_step(self, trainer: lightning.Trainer, module: Trained, step: int) -> None:
        """A point of every curve. The loss is a mean over processes, so all of them ask for it."""
        loss = self.last_loss = module.mean_loss()
        self.first_loss = loss if self.first_loss is None else self.first_loss
        now, seen = time.perf_counter(), module.tokens_seen
        rate = (seen - self.mark[1]) / (now - self.mark[0])
        self.mark = (now, seen)
        if not trainer.is_global_zero:
            return
        self.rates.append(rate)
        memory = memory_bytes(trainer.strategy.root_device)
        self.memory_bytes = max(self.memory_bytes, memory)
        values = {
            "train_loss": loss,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": module.gradient_norm,
            "tokens_per_second": rate,
            "mfu": self.mfu(rate),
            "memory_bytes": float(memory),
            "tokens": float(seen),
        }
        self.metrics.metrics(values, step)
        line = f"{self.title} loss {loss:.3f} {rate:,.0f} tokens/s"
        if self.progress:
            self.progress.update(self.bar, completed=step, description=line)
        elif step % (self.options.log_every_steps * 10) == 0 or step == self.steps:
            self.console.print(f"{line} step {step}/{self.steps}", highlight=False, soft_wrap=True)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Of a speed; None where no ceiling is known."""
        ceiling = self.matmul_flops_per_second
        return tokens_per_second * self.flops_per_token / ceiling if ceiling else None

    def log_validation(self, trainer: lightning.Trainer, module: Trained, step: int) -> None:
        """Figures, samples, and what follows from them.

        Every process has computed the same figures, but for the last bit that another order of additions may change. A
        bit can decide which of two scores is better, and processes that disagree on whether to go on wait for each
        other for ever; so they all take the first one's.
        """
        began = time.perf_counter()
        module.eval()
        # Other shapes than training's, and a state: compiled blocks would be compiled again for each.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            figures = self.validate(module.model)
            written = self.samples(module.model) if self.samples else None
        module.train()
        self.validation, self.validated_step = trainer.strategy.broadcast(figures), step
        if self.judge(step) and self.options.patience:
            self.keep_best()
        if self.stopped:
            trainer.should_stop = True
        if trainer.is_global_zero:
            self.metrics.metrics(self.validation, step)
            if written:
                self.metrics.text(f"samples/step-{step:06d}.md", written)
            self.tell(step)
        self.mark = (self.mark[0] + time.perf_counter() - began, self.mark[1])  # validation is not training time

    def judge(self, step: int) -> bool:
        """Whether the last validation is the best so far. Raises `TogetherError` if patience has nothing to go by."""
        now, before = score(self.validation), score(self.best)
        if now is None:
            if self.options.patience:
                raise TogetherError(
                    f"training.patience must be 0 where validation finds no accuracy or loss to compare, "
                    f"got {self.options.patience}"
                )
            return False
        better = math.isfinite(now) and (before is None or now > before)
        if better:
            self.best, self.best_step, self.stale = self.validation, step, 0
        else:
            self.stale += 1
        return better

    def tell(self, step: int) -> None:
        """One line on the terminal."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self.validation.items())
        end = f"  no better than at step {self.best_step}: enough" if self.stopped else ""
        self.console.print(f"{self.title} step {step}/{self.steps}  {shown}{end}", highlight=False, soft_wrap=True)

    def teardown(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        if self.progress:
            self.progress.stop()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit could not find out again."""
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, state[name])
        self.first_step = self.step  # for a fit that was killed when it had no step left

    def story(self) -> Story:
        """What there is to tell of the fit, in the first process."""
        rate = statistics.median(self.rates) if self.rates else None
        return Story(
            title=self.title,
            steps=self.step,
            planned_steps=self.steps,
            tokens=self.tokens,
            resumed_at_step=self.first_step,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            validation=self.exported,
            validated_at_step=self.best_step if self.keeps_best else self.validated_step,
            tokens_per_second=rate,
            intervals=len(self.rates),
            mfu=None if rate is None else self.mfu(rate),
            memory_bytes=self.memory_bytes or None,
        )


KEPT = ("step", "tokens", "validation", "validated_step", "best", "best_step", "stale", "first_loss", "last_loss")
"""Of a watch, in a running checkpoint."""


def memory_bytes(device: torch.device) -> int:
    """On a GPU the most that tensors took so far, on a CPU what the process holds in memory now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
