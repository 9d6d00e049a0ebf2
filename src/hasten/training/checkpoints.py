"""Running checkpoints: a fit that is killed goes on where it was.

`step-N.ckpt` lies in a scratch folder named by a hash of everything that decides the result, so a resumed fit continues
the same work and never another's. One process or copies of one write a file; processes that hold parts of weights write
a folder, each its part, which any number of processes can read. What is seen and drawn at a step is a function of the
step, so nothing else has to be kept.

A new one is complete, and has its name, before the old one goes: a kill or a full disk costs the steps since then.
"""

from __future__ import annotations

import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from hasten.artifacts import disk_is_full
from hasten.errors import TogetherError, UserError
from hasten.ranks import exit_code
from hasten.training.options import Training

NAME = re.compile(r"step-(\d+)\.ckpt")


def found(scratch: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints with their steps, the latest last."""
    named = [(NAME.fullmatch(path.name), path) for path in scratch.glob("step-*.ckpt")]
    return sorted((int(match[1]), path) for match, path in named if match)


def latest(scratch: Path, sharded: bool) -> Path | None:
    """Where to go on. Raises `UserError` if that was written in the other way."""
    checkpoints = found(scratch)
    if not checkpoints:
        return None
    step, path = checkpoints[-1]
    if path.is_dir() is not sharded:
        ways = ("single or ddp", "fsdp, tensor_parallel or hybrid")
        raise UserError(
            f"training.strategy must be {ways[path.is_dir()]} to go on from step {step}, which was written so; or "
            f"delete {scratch} to begin again"
        )
    return path


class Checkpoints(Callback):
    """Saves every so many steps, and on SIGTERM after the step at hand, with exit code 143.

    A signal that reaches one process ends all: they agree at the end of every step.
    """

    def __init__(self, options: Training, scratch: Path, sharded: bool) -> None:
        self.options, self.scratch, self.sharded = options, scratch, sharded
        self.asked_to_stop = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM is noted, not obeyed at once; outside the main thread signals are not ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(signum: int, frame: FrameType | None) -> None:
            self.asked_to_stop = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.options.accumulate:
            return
        stop = any_of(trainer, self.asked_to_stop)
        if stop or trainer.global_step % self.options.checkpoint_every_steps == 0:
            self.save(trainer)
        if stop:
            raise SystemExit(exit_code(128 + signal.SIGTERM))

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint of this step, then remove the ones before it. All processes take part.

        Raises `TogetherError` in all of them if the disk is full.
        """
        path = self.scratch / f"step-{trainer.global_step}.ckpt"
        temporary = self.scratch / f".{path.name}"
        if path.exists():
            return  # a fit that went on from it and was told to end at once
        trainer.strategy.barrier()

        def write() -> None:
            if trainer.is_global_zero:
                self.scratch.mkdir(parents=True, exist_ok=True)
                for left in self.scratch.glob(".step-*"):
                    remove(left)  # of a process that was killed while it wrote
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            if self.sharded:
                trainer.strategy.save_checkpoint(checkpoint, temporary)
            elif trainer.is_global_zero:
                with temporary.open("wb") as file:
                    torch.save(checkpoint, file)

        try:
            together(trainer, write, path)
        except BaseException:
            if trainer.is_global_zero:
                remove(temporary)
            raise
        if trainer.is_global_zero:
            before = [old for _, old in found(self.scratch)]
            temporary.replace(path)
            for old in before:
                remove(old)
        trainer.strategy.barrier()


def together(trainer: lightning.Trainer, write: Callable[[], None], path: Path) -> None:
    """Let every process do its part of writing `path` (its folder has the running checkpoints).

    Raises `TogetherError` in all processes if the disk is full for any of them; else what went wrong, where it did.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    failure: BaseException | None = None
    try:
        write()
    except (Exception, CheckpointException) as error:
        failure = error
    if not any_of(trainer, failure is not None):
        return
    reasons = [wrapped for wrapped, _ in getattr(failure, "failures", {}).values()] or [failure]
    full = any(isinstance(reason, Exception) and disk_is_full(reason, path.parent) for reason in reasons)
    if any_of(trainer, full):
        steps = [step for step, _ in found(path.parent)]
        kept = f"step {steps[-1]} is kept, the fit goes on from it" if steps else "there is no step to go on from yet"
        raise TogetherError(f"{path} could not be written: no space left on the device; {kept}") from failure
    if failure is not None:
        raise failure
    raise TogetherError(f"{path} could not be written by another process")


def any_of(trainer: lightning.Trainer, said: bool) -> bool:
    """Whether any process says so; all have to ask."""
    if trainer.world_size == 1:
        return said
    count = torch.tensor(float(said), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(count, reduce_op="sum") > 0)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
