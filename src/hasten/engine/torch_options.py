"""What the engines made of torch have in common: the devices they know, and types that follow the weights'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hasten.config import environment
from hasten.engine.base import Dtype, Engine
from hasten.errors import UserError

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_device(engine: Engine) -> None:
    """Raises `UserError` unless it is the processor alone or one CUDA device."""
    if len(engine.devices) != 1 or not re.fullmatch(r"cpu|cuda(:\d+)?", engine.devices[0]):
        raise UserError(f"engine.devices must be one of [cpu], [cuda:0], got {engine.devices}")


def check_follows(engine: Engine, weights: Dtype, *options: str) -> None:
    """Raises `UserError` unless these options (`activation_dtype`, `kv_cache_dtype`) are the weights' type, or auto."""
    for name in options:
        if getattr(engine, name) not in (Dtype.auto, weights):
            raise UserError(
                f"engine.{name} must be auto or {weights.name} (the weights' own) for {engine.name}, "
                f"got {getattr(engine, name).name}"
            )


def prepare(engine: Engine) -> None:
    """Give torch this engine's threads. Raises `UserError` if its device is not there."""
    import torch

    if engine.devices[0] != "cpu" and not torch.cuda.is_available():
        raise UserError(f"engine.devices asks for {engine.devices[0]}, this machine has no CUDA device")
    torch.set_num_threads(engine.thread_count)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """What torch compiles meanwhile is kept there, and found there."""
    folder.mkdir(parents=True, exist_ok=True)
    with environment({CACHE_VARIABLE: str(folder.resolve())}):
        yield
