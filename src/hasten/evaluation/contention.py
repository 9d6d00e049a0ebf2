"""Who else was computing: processor time that other processes took while something was timed.

The kernel counts, per core, how long it was busy (/proc/stat) and, per process, how long it ran. What
the watched cores were busy less what this process and its descendants ran is what others took, in
cores (0.1 = a tenth of one core). Steal, which the hypervisor gave to other machines while this one
wanted to run, is a figure of its own. Processes of others that start and end between two readings are
in the cores' totals; those of our own are in their parent's total once it has waited for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

NOISY_CORES = 0.1
"""Above this much of one core, a measurement is marked `noisy`."""
TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
"""What /proc/stat counts in (USER_HZ, 100 per second on every common platform)."""
BUSY_FIELDS = (0, 1, 2, 5, 6)
"""user, nice, system, irq, softirq of a `cpuN` line; the kernel counts guest time in `user` already."""
STEAL_FIELD = 7


@dataclass(frozen=True)
class Process:
    """started: seconds since boot. ran: processor seconds of all its threads. reaped: of children it waited for."""

    started: float
    ran: float
    reaped: float


@dataclass(frozen=True)
class ProcessorTime:
    """One reading. at: when (`time.perf_counter`). since_boot: when, in the clock that processes' starts are told in.

    busy, stolen: seconds of the watched cores since boot, None where the kernel does not tell. own: this process and
    its descendants by their id.
    """

    at: float
    since_boot: float
    busy: float | None
    stolen: float | None
    own: dict[int, Process]


def read(cores: Collection[int], system: Path = Path("/"), known: Collection[int] = ()) -> ProcessorTime:
    """All counters now, as close together as can be. known: ids to look up although they may have left the family."""
    proc = system / "proc"
    own = dict(_alive(proc, {*family(proc, os.getpid()), *known}))
    try:
        busy, stolen = parse_stat((proc / "stat").read_text(), cores)
    except OSError:
        busy, stolen = None, None
    return ProcessorTime(time.perf_counter(), since_boot(), busy, stolen, own)


def contention(before: ProcessorTime, after: ProcessorTime) -> tuple[float | None, float | None, str | None]:
    """(cores that others used, cores stolen, None), or None for what cannot be told, and why."""
    seconds = after.at - before.at
    if seconds <= 0:
        return None, None, "no time passed"
    stolen = None
    if before.stolen is not None and after.stolen is not None:
        stolen = max(0.0, after.stolen - before.stolen) / seconds
    if before.busy is None or after.busy is None:
        return None, stolen, "this system has no /proc/stat that lists the cores of this process"
    cores, why = share(seconds, after.busy - before.busy, own_seconds(before, after))
    return cores, stolen if why is None else None, why


def share(seconds: float, busy: float, own: float) -> tuple[float | None, str | None]:
    """(cores that others used, None), or (None, why not), from the seconds that passed, all busy, and own."""
    if busy < own / 2 - 2 * TICK_SECONDS:  # a sandbox with frozen or foreign counters: claiming quiet would be a lie
        return None, "the kernel's processor counters do not include this process"
    return max(0.0, busy - own) / seconds, None


def own_seconds(before: ProcessorTime, after: ProcessorTime) -> float:
    """Processor seconds that this process and its descendants used between two readings.

    What cannot be attributed for certain (the time of a process that somebody else waited for, or of one that only
    the second reading found) is not counted as own: it can make a quiet time look noisy, never the reverse.
    """
    own = reaped = 0.0
    for pid, process in after.own.items():
        earlier = before.own.get(pid)
        if earlier is not None and earlier.started == process.started:
            own += process.ran - earlier.ran
            reaped += process.reaped - earlier.reaped
        elif process.started >= before.since_boot - TICK_SECONDS:
            own += process.ran
            reaped += process.reaped
    ended = (
        process.ran + process.reaped
        for pid, process in before.own.items()
        if pid not in after.own or after.own[pid].started != process.started
    )
    return own + max(0.0, reaped - sum(ended))


def parse_stat(text: str, cores: Collection[int]) -> tuple[float | None, float | None]:
    """(busy, stolen) seconds since boot of the given cores, from /proc/stat; None where no line tells of them."""
    busy = stolen = None
    for line in text.splitlines():
        if not line.startswith("cpu"):
            break  # the lines of the cores come first; the rest can be long
        name, *fields = line.split()
        if not name[3:].isdigit() or int(name[3:]) not in cores:
            continue
        ticks = [int(field) for field in fields]
        if len(ticks) > max(BUSY_FIELDS):
            busy = (busy or 0.0) + sum(ticks[field] for field in BUSY_FIELDS) * TICK_SECONDS
        if len(ticks) > STEAL_FIELD:
            stolen = (stolen or 0.0) + ticks[STEAL_FIELD] * TICK_SECONDS
    return busy, stolen


def parse_process(text: str) -> tuple[int, Process]:
    """(parent, times) from /proc/PID/stat. Raises `ValueError` for another text."""
    fields = stat_fields(text)
    user, system, reaped_user, reaped_system = (int(field) for field in fields[11:15])
    ran, reaped = (user + system) * TICK_SECONDS, (reaped_user + reaped_system) * TICK_SECONDS
    return int(fields[1]), Process(int(fields[19]) * TICK_SECONDS, ran, reaped)


def stat_fields(text: str) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, group, session and so on (proc(5)).

    The name stands in brackets and may hold brackets and spaces itself. Raises `ValueError` for another text.
    """
    _, closing, rest = text.rpartition(")")
    fields = rest.split()
    if not closing or len(fields) < 20:
        raise ValueError(f"not a line of /proc/PID/stat: {text[:80]!r}")
    return fields


def family(proc: Path, pid: int) -> set[int]:
    """A process and all its living descendants.

    The kernel lists a thread's children where it was built to (CONFIG_PROC_CHILDREN, as distributions do); elsewhere
    every process is asked for its parent, which takes about 20 us each.
    """
    children = _children_listed if (proc / f"{pid}/task/{pid}/children").exists() else _children_found(proc)
    found, waiting = {pid}, [pid]
    while waiting:
        more = children(proc, waiting.pop()) - found
        waiting += more
        found |= more
    return found


def _children_listed(proc: Path, pid: int) -> set[int]:
    tasks = f"{proc}/{pid}/task"
    found: set[int] = set()
    for task in _names(tasks):
        try:
            with open(f"{tasks}/{task}/children", "rb", buffering=0) as file:  # noqa: PTH123 (a Path takes 20 us more)
                found.update(map(int, file.read().split()))
        except OSError:  # the thread ended meanwhile
            continue
    return found


def _children_found(proc: Path) -> Callable[[Path, int], set[int]]:
    children: dict[int, set[int]] = {}
    for name in _names(str(proc)):
        if name.isdigit():
            try:
                parent, _ = parse_process((proc / name / "stat").read_text())
            except (OSError, ValueError):
                continue
            children.setdefault(parent, set()).add(int(name))
    return lambda _, pid: children.get(pid, set())


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (a Path per thread takes longer than reading its file)
    except OSError:
        return []


def _alive(proc: Path, pids: Collection[int]) -> Iterator[tuple[int, Process]]:
    for pid in pids:
        try:
            _, process = parse_process((proc / str(pid) / "stat").read_text())
        except (OSError, ValueError):  # it ended meanwhile
            continue
        ran = cpu_clock(pid)
        yield pid, process if ran is None else Process(process.started, ran, process.reaped)


def cpu_clock(pid: int) -> float | None:
    """Processor seconds of a process to the nanosecond (its CPU-time clock, clock_getcpuclockid(3)), if it has one."""
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return None


def since_boot() -> float:
    """Seconds since boot, as /proc/PID/stat tells when a process started."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
