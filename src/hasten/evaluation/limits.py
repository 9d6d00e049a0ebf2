"""What a trial's process may take, time and memory, and what the kernel says about running out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil

from hasten.errors import UserError
from hasten.evaluation import control_groups

DEFAULT_SHARE = 0.9
"""How much of the machine's memory a trial may take if nothing else is said."""
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """For one process of a trial with all it starts.

    timeout_seconds: for each thing it is asked. memory_bytes: resident; None stands for nine tenths of what
    the machine (or the container) has.
    """

    timeout_seconds: float = 600.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise UserError(f"timeout_seconds must be above 0, got {self.timeout_seconds:g}")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise UserError(f"memory_bytes must be above 0, got {self.memory_bytes}")

    @classmethod
    def of(cls, timeout_seconds: float, memory_limit_gib: float) -> Limits:
        """From a stage's options, where a memory limit of 0 stands for the default."""
        if not memory_limit_gib >= 0:
            raise UserError(
                f"memory_limit_gib must be 0 (nine tenths of the machine's) or more, got {memory_limit_gib}"
            )
        return cls(timeout_seconds, round(memory_limit_gib * GIB) if memory_limit_gib else None)

    @property
    def memory(self) -> int:
        """Bytes, with the default resolved."""
        return self.memory_bytes or int(DEFAULT_SHARE * machine_memory_bytes())

    @property
    def memory_sentence(self) -> str:
        """The limit as it is called in an error."""
        default = ", nine tenths of this machine's memory" if self.memory_bytes is None else ""
        return f"memory_limit_gib ({self.memory / GIB:.3g} GiB{default})"


def machine_memory_bytes(system: Path = Path("/")) -> int:
    """The machine's memory, or less where a control group (a container) allows less."""
    total = int(psutil.virtual_memory().total)
    for folder in (folder for tree in control_groups.trees("memory", system) for folder in tree):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
                total = min(total, int((folder / name).read_text()))
    return total


def oom_kills(system: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed because memory ran out, since boot; None if it does not say."""
    try:
        lines = (system / "proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
