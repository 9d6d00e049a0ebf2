"""The loop both fits share: Lightning drives, callbacks watch, a kill costs at most one checkpoint interval.

The running checkpoint (`last.ckpt`) lives in a scratch folder named by a hash of everything that
decides the result, so a resumed run continues the same work and never another's. It is removed when
the fit is done; the model is exported by the caller.
"""

from __future__ import annotations

import logging
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import Dataset

from hasten.errors import UserError
from hasten.hardware import cpu_count
from hasten.model.network import Network
from hasten.training.data import Batch
from hasten.training.module import LanguageModel
from hasten.training.options import Precision, Training

Validate = Callable[[Network], dict[str, float]]


class Metrics(Protocol):
    """Where curves go."""

    def metrics(self, values: dict[str, float], step: int | None = None) -> None: ...


@dataclass
class Fitted:
    """What a fit did. The last validation's figures and the training's size; seconds are this run's."""

    steps: int
    tokens: int
    seconds: float
    resumed_at_step: int
    validation: dict[str, float]

    def figures(self) -> dict[str, float]:
        """For the run's table."""
        return {"steps": self.steps, "trained_tokens": self.tokens, "fit_seconds": self.seconds, **self.validation}


def computes_bfloat16(accelerator: str) -> bool:
    """Whether bfloat16 is computed in hardware, not emulated."""
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Any = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "AVX512" in str(capabilities) and "avx512_bf16" in flags


def fit(
    model: Network,
    batches: Dataset[Batch],
    options: Training,
    *,
    steps: int,
    scratch: Path,
    seed: int,
    validate: Validate,
    metrics: Metrics,
    title: str,
) -> Fitted:
    """Train `model` in place for `steps` optimiser steps.

    Raises `UserError` on a loss that is not finite; exits with 143 on SIGTERM after saving.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    warnings.filterwarnings("ignore", module="lightning|torchdata")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads or cpu_count())
    lightning.seed_everything(seed, verbose=False)
    accelerator = options.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    low = options.precision is Precision.bfloat16 or (
        options.precision is Precision.auto and computes_bfloat16(accelerator)
    )
    module = LanguageModel(model, options, steps)
    last = scratch / "last.ckpt"
    watch = Watch(options, steps, last, validate, metrics, title)
    keep = ModelCheckpoint(
        scratch, filename="last", every_n_train_steps=options.checkpoint_every_steps, save_top_k=1,
        enable_version_counter=False, save_on_exception=False,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        precision="bf16-mixed" if low else "32-true",
        accumulate_grad_batches=options.accumulate,
        callbacks=[watch, keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=options.log_every_steps,
    )
    loader = StatefulDataLoader(batches, batch_size=None, num_workers=0)
    start = time.perf_counter()
    try:
        with noting_sigterm():
            trainer.fit(module, loader, ckpt_path=last if last.exists() else None, weights_only=False)
    except SIGTERMException:
        raise SystemExit(143) from None
    seconds = time.perf_counter() - start
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        rate = options.learning_rate
        raise UserError(f"the weights are not finite after step {steps}; lower training.learning_rate (now {rate})")
    model.cpu()
    shutil.rmtree(scratch, ignore_errors=True)
    return Fitted(trainer.global_step, module.tokens_seen, seconds, watch.first_step, watch.validation)


@contextmanager
def noting_sigterm() -> Iterator[None]:
    """Leave SIGTERM to Lightning, which ends the fit after the batch; a handler that ends the process at once would
    keep it from saving.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Watch(Callback):
    """Progress, curves and validation. One line per logging interval where there is no terminal."""

    def __init__(
        self, options: Training, steps: int, last: Path, validate: Validate, metrics: Metrics, title: str
    ) -> None:
        self.options, self.steps, self.last = options, steps, last
        self.validate, self.metrics, self.title = validate, metrics, title
        self.console = Console(stderr=True)
        self.validation: dict[str, float] = {}
        self.first_step = 0
        self.between_steps = True
        self.progress: Progress | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: LanguageModel) -> None:
        self.first_step = trainer.global_step
        self.mark = (time.perf_counter(), module.tokens_seen)
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.progress.start()
            self.bar = self.progress.add_task(self.title, total=self.steps, completed=self.first_step)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: LanguageModel, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.between_steps = (batch_idx + 1) % self.options.accumulate == 0
        if not self.between_steps:
            return
        step = trainer.global_step
        if step % self.options.log_every_steps == 0 or step == self.steps:
            self.log_step(trainer, module, step)
        if step % self.options.validate_every_steps == 0 or step == self.steps:
            self.log_validation(module, step)

    def log_step(self, trainer: lightning.Trainer, module: LanguageModel, step: int) -> None:
        now, seen = time.perf_counter(), module.tokens_seen
        rate = (seen - self.mark[1]) / (now - self.mark[0])
        self.mark = (now, seen)
        values = {
            "train_loss": module.mean_loss(),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "gradient_norm": module.gradient_norm,
            "tokens_per_second": rate,
            "tokens": float(seen),
        }
        self.metrics.metrics(values, step)
        line = f"{self.title} loss {values['train_loss']:.3f} {rate:,.0f} tokens/s"
        if self.progress:
            self.progress.update(self.bar, completed=step, description=line)
        elif step % (self.options.log_every_steps * 10) == 0 or step == self.steps:
            self.console.print(f"{line} step {step}/{self.steps}", highlight=False, soft_wrap=True)

    def log_validation(self, module: LanguageModel, step: int) -> None:
        began = time.perf_counter()
        module.eval()
        with torch.no_grad():
            self.validation = self.validate(module.model)
        module.train()
        self.metrics.metrics(self.validation, step)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self.validation.items())
        self.console.print(f"{self.title} step {step}/{self.steps}  {shown}", highlight=False, soft_wrap=True)
        self.mark = (self.mark[0] + time.perf_counter() - began, self.mark[1])  # validation is not training time

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save on SIGTERM, here, where the loops still know their place; before `fit` returns they are taken down.

        Not in the middle of an accumulated step: its gradients are no part of a checkpoint.
        """
        if isinstance(exception, SIGTERMException) and self.between_steps:
            trainer.save_checkpoint(self.last)

    def teardown(self, trainer: lightning.Trainer, module: LanguageModel, stage: str) -> None:
        if self.progress:
            self.progress.stop()

    def state_dict(self) -> dict[str, Any]:
        """Random state, as a tensor, so that a resumed run draws what an uninterrupted one would have; last figures."""
        return {"rng": torch.get_rng_state(), "validation": self.validation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["rng"])
        self.validation = state["validation"]
