"""Whether the machine was slowed down on purpose: heat, a container's CPU quota, and the clock it ran at.

- Heat: Intel processors count how often a core or its package was throttled
  (/sys/devices/system/cpu/cpuN/thermal_throttle). Hyperthreads of a core show the same counter.
- Quota: a control group with a CPU limit counts how long it was held back (cpu.stat: `throttled_usec`
  in version 2, `throttled_time` in nanoseconds in version 1, each summed over cores). Every group above
  this process' own can hold it back too.
- Clock: what cpufreq or /proc/cpuinfo say at the moment of reading. A record, not a criterion: clocks
  follow the load.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hasten.evaluation import control_groups

MOST_CLOCKS = 8
"""Clocks are read of so many cores at most: on some kernels each takes a sleep of 10 ms."""
Counter = tuple[float | None, str | None]
"""(value, None), or (None, why it could not be read)."""

NO_THERMAL = "this system has no thermal_throttle counters"
NO_QUOTA = "no control group of this process counts CPU throttling"
NO_CLOCK = "neither cpufreq nor /proc/cpuinfo tells a clock"


@dataclass(frozen=True)
class Slowdowns:
    """One reading of the counters: events of thermal throttling, seconds held back by a quota."""

    thermal: Counter
    quota: Counter


def read(cores: frozenset[int], system: Path = Path("/")) -> Slowdowns:
    """The counters of these cores and of this process' control groups, now."""
    return Slowdowns(
        _sum(_thermal_files(cores, system), NO_THERMAL, _whole),
        _sum(_quota_files(system), NO_QUOTA, quota_seconds),
    )


def increase(before: Counter, after: Counter) -> Counter:
    """What was added between two readings; a counter that went backwards was reset, and says nothing."""
    if before[0] is None or after[0] is None:
        return None, before[1] or after[1]
    if after[0] < before[0]:
        return None, "the counter was reset meanwhile"
    return after[0] - before[0], None


def _sum(files: tuple[Path, ...], missing: str, parse: Callable[[str], float | None]) -> Counter:
    values = []
    for file in files:
        try:
            value = parse(file.read_text())
        except OSError as error:
            return None, f"{file.name} could not be read: {error.strerror}"
        if value is not None:
            values.append(value)
    return (float(sum(values)), None) if values else (None, missing)


def _whole(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


@lru_cache(maxsize=64)
def _thermal_files(cores: frozenset[int], system: Path) -> tuple[Path, ...]:
    """One counter per physical core and one per package, however many hyperthreads show it."""
    files: dict[tuple[str, ...], Path] = {}
    for core in sorted(cores):
        folder = system / f"sys/devices/system/cpu/cpu{core}"
        package = _text(folder / "topology/physical_package_id") or "?"
        own = _text(folder / "topology/core_id") or f"cpu{core}"
        for key, name in (((package, own), "core_throttle_count"), ((package,), "package_throttle_count")):
            path = folder / "thermal_throttle" / name
            if key not in files and path.exists():
                files[key] = path
    return tuple(files.values())


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


@lru_cache(maxsize=8)
def _quota_files(system: Path) -> tuple[Path, ...]:
    """cpu.stat of this process' control group and of those above it, of the first tree that counts throttling."""
    for tree in control_groups.trees("cpu", system):
        if files := tuple(file for folder in tree if _counts(file := folder / "cpu.stat")):
            return files
    return ()


def _counts(file: Path) -> bool:
    text = _text(file)
    return text is not None and quota_seconds(text) is not None


def quota_seconds(text: str) -> float | None:
    """Seconds held back, from a cpu.stat of either version; None where it does not count them."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isdigit():
            if name == "throttled_usec":
                return int(value) / 1e6
            if name == "throttled_time":
                return int(value) / 1e9
    return None


def clock_mhz(cores: Collection[int], system: Path = Path("/")) -> Counter:
    """The mean clock of (at most `MOST_CLOCKS` of) these cores at this moment."""
    clocks = []
    for core in sorted(cores)[:MOST_CLOCKS]:
        text = _text(system / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq")
        if text is not None and text.isdigit():
            clocks.append(int(text) / 1000)
    if not clocks:
        listed = parse_cpuinfo(_text(system / "proc/cpuinfo") or "")
        clocks = [clock for core, clock in listed.items() if core in cores]
    return (sum(clocks) / len(clocks), None) if clocks else (None, NO_CLOCK)


def parse_cpuinfo(text: str) -> dict[int, float]:
    """MHz by core, from /proc/cpuinfo; empty where it does not tell (most Arm kernels)."""
    clocks: dict[int, float] = {}
    core: int | None = None
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "processor":
            core = int(value) if value.isdigit() else None
        elif name == "cpu MHz" and core is not None:
            try:
                clocks[core] = float(value)
            except ValueError:
                continue
    return clocks
