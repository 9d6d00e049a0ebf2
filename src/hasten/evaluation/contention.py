"""Who else was computing: the processor time that other processes took while something was timed.

Engines that wait in spin loops fall to a tenth of their speed when another process wants one of
their cores, so a time without this figure cannot be trusted. It is the time the cores this process
may use were busy, or were taken away by the hypervisor, less what this process spent itself, in
cores (0.1 = a tenth of one core), from the kernel's counters.
"""

from __future__ import annotations

import os
import time
from types import TracebackType

import psutil

NOISY_CORES = 0.1
"""Above this much of one core, a measurement is marked `noisy`."""
BUSY_FIELDS = ("user", "nice", "system", "irq", "softirq", "steal")
"""What counts as busy; the kernel counts guest time in `user` already."""


class Contention:
    """A context manager; afterwards `cores` is what others used, None (and `why`) if it cannot be told."""

    cores: float | None = None
    why: str | None = None

    def __enter__(self) -> Contention:
        self._start = time.perf_counter(), busy_seconds(), own_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed, busy, own = (
            after - before
            for after, before in zip((time.perf_counter(), busy_seconds(), own_seconds()), self._start, strict=True)
        )
        self.cores, self.why = share(elapsed, busy, own)


def share(elapsed: float, busy: float, own: float) -> tuple[float | None, str | None]:
    """(cores that others used, None), or (None, why not), from seconds elapsed, all busy, and own."""
    if elapsed <= 0:
        return None, "no time passed"
    if busy < own / 2:  # a sandbox with frozen or foreign counters: claiming quiet would be a lie
        return None, "the kernel's processor counters do not include this process"
    return max(0.0, busy - own) / elapsed, None


def busy_seconds() -> float:
    """Seconds since boot that the cores this process may use were busy."""
    per_core = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(len(per_core)))
    return sum(
        getattr(times, field, 0.0) for core, times in enumerate(per_core) if core in allowed for field in BUSY_FIELDS
    )


def own_seconds() -> float:
    """Processor seconds that this process and its children have used."""
    process = psutil.Process()
    times = process.cpu_times()
    total: float = times.user + times.system
    total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    for child in process.children(recursive=True):
        try:
            child_times = child.cpu_times()
        except psutil.Error:  # it ended meanwhile, and is in the parent's `children_*` from now on
            continue
        total += child_times.user + child_times.system
    return total
