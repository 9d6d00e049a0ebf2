"""Under which conditions something was timed: who else computed, was the machine slowed down, what did it draw.

Engines that wait in spin loops fall to a tenth of their speed when another process wants one of their
cores, so a time without its conditions cannot be trusted. A `Watch` reads the machine's counters before
and after and keeps the differences; nothing runs in between. A repetition is `quiet` when nothing that
could be read says otherwise. What could not be read is null, with the reason in `why`, and does not
count as noise. `docs/measuring.md` says where each number comes from.

    with Watch() as watch:
        samples = scenario.measure(session, prompts, seed, report)
    Repetition(samples, watch.conditions).conditions.quiet
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.evaluation import contention, energy, gpu, throttling
from hasten.evaluation.contention import NOISY_CORES, TICK_SECONDS
from hasten.scenario.timing import Sample

QUOTA_SHARE = 0.01
"""Above this share of the time held back by a container's quota, a repetition is not quiet."""


@dataclass(frozen=True)
class Conditions:
    """What the machine did while something ran for `seconds`. All else may be null; then `why` says the reason.

    cores: how many were watched (those the watching process may use). contention_cores: processor time that other
    processes took on them, per second (0.1 = a tenth of one core), without steal. steal_cores: the same for what the
    hypervisor took away. throttle_events: how often those cores or their package slowed down for heat.
    quota_throttled_seconds: how long the container's CPU quota held its threads back, summed over cores.
    clock_mhz: their mean clock at the end. gpu_cotenants: other processes that hold a context on the GPUs used.
    gpu_throttle: why those GPUs clock lower than they could (heat, power brake), empty if they do not.
    gpu_clock_mhz: the clock of the slowest of them at the end. energy_joules: what the whole processor packages (all
    processes on them) and the GPUs used drew; energy_source: which counters that is.
    """

    seconds: float
    cores: int | None = None
    contention_cores: float | None = None
    steal_cores: float | None = None
    throttle_events: int | None = None
    quota_throttled_seconds: float | None = None
    clock_mhz: float | None = None
    gpu_cotenants: int | None = None
    gpu_throttle: tuple[str, ...] | None = None
    gpu_clock_mhz: float | None = None
    energy_joules: float | None = None
    energy_source: str | None = None
    why: Mapping[str, str] = field(default_factory=dict)

    @property
    def noise(self) -> dict[str, float]:
        """Every disturbance in multiples of what is still quiet; above 1 it is not."""
        seconds = max(self.seconds, 1e-9)
        # Counters in whole ticks are off by about one tick per core in either direction.
        unseen = 2 * TICK_SECONDS * math.sqrt(self.cores or 1) / seconds
        quiet_cores = max(NOISY_CORES, unseen)
        multiples = {
            "contention_cores": (self.contention_cores or 0.0) / quiet_cores,
            "steal_cores": (self.steal_cores or 0.0) / quiet_cores,
            "throttle_events": 2.0 * (self.throttle_events or 0),
            "quota_throttled_seconds": (self.quota_throttled_seconds or 0.0) / seconds / QUOTA_SHARE,
            "gpu_cotenants": 2.0 * (self.gpu_cotenants or 0),
            "gpu_throttle": 2.0 * len(self.gpu_throttle or ()),
        }
        return {name: round(multiple, 6) for name, multiple in multiples.items()}  # exactly on the limit is quiet

    @property
    def quiet(self) -> bool:
        """Whether nothing that could be read disturbed."""
        return all(multiple <= 1 for multiple in self.noise.values())

    @property
    def disturbance(self) -> float:
        """How much was disturbed, to choose between attempts; it says nothing about what was measured."""
        return sum(self.noise.values())

    @property
    def disturbances(self) -> list[str]:
        """What made it not quiet, in words; empty if it was quiet."""
        words = {
            "contention_cores": f"other processes used {self.contention_cores or 0:.2f} cores",
            "steal_cores": f"the hypervisor took {self.steal_cores or 0:.2f} cores",
            "throttle_events": f"the processor was throttled for heat {self.throttle_events} times",
            "quota_throttled_seconds": f"the CPU quota held it back for {self.quota_throttled_seconds or 0:.2f} s",
            "gpu_cotenants": f"other processes hold the GPU ({self.gpu_cotenants})",
            "gpu_throttle": f"the GPU was slowed down ({', '.join(self.gpu_throttle or ())})",
        }
        return [words[name] for name, multiple in self.noise.items() if multiple > 1]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "gpu_throttle": None if self.gpu_throttle is None else list(self.gpu_throttle)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Conditions:
        throttle = fields.get("gpu_throttle")
        return cls(**{**fields, "gpu_throttle": None if throttle is None else tuple(throttle)})


@dataclass(frozen=True)
class Repetition:
    """Part of a scenario, measured in one go. attempts: how many it took until it was quiet, or time was up."""

    samples: list[Sample]
    conditions: Conditions
    attempts: int = 1

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": [asdict(sample) for sample in self.samples],
            "conditions": self.conditions.to_json(),
            "attempts": self.attempts,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Repetition:
        samples = [Sample(**sample) for sample in fields["samples"]]
        return cls(samples, Conditions.from_json(fields["conditions"]), fields["attempts"])


@dataclass(frozen=True)
class _Reading:
    """All counters at one moment."""

    processor: contention.ProcessorTime
    energy: energy.Energy
    slowdowns: throttling.Slowdowns
    gpu: gpu.GpuReading | None


class Watch:
    """A context manager; afterwards `conditions` is what happened meanwhile.

    devices: those of the job's engine (`cpu`, `cuda:0`). cores: which ones to watch, those this process may use
    by default; give the workers' own where they are confined to some. Workers must be this process' descendants:
    their processor time counts as its own, also if they start or end meanwhile. system: where /proc and /sys lie.

    Entering and leaving take 1 to 2 ms together (measured: 30 threads, 4 children, a loaded machine with 2 cores), a
    quarter of a percent of a pass of 0.6 s and outside of what is timed. Kernels that do not list children cost 20 us
    more per process on the machine, twice.
    """

    conditions: Conditions

    def __init__(
        self, devices: Sequence[str] = ("cpu",), *, cores: Collection[int] | None = None, system: Path = Path("/")
    ) -> None:
        self.cores = frozenset(cores if cores is not None else _allowed())
        self.system = system
        self._gpus = gpu.Gpus.of(devices)

    def __enter__(self) -> Watch:
        slowdowns = throttling.read(self.cores, self.system)
        on_gpu = None
        if self._gpus is not None:  # the slow one first, so that the counters of time and energy are read together
            on_gpu = self._gpus.read(contention.family(self.system / "proc", os.getpid()))
        joules = energy.read(self.system)
        self._before = _Reading(contention.read(self.cores, self.system), joules, slowdowns, on_gpu)
        return self

    def __exit__(self, *_: object) -> None:
        processor = contention.read(self.cores, self.system, known=self._before.processor.own)
        joules = energy.read(self.system)
        on_gpu = self._gpus.read(processor.own) if self._gpus is not None else None
        after = _Reading(processor, joules, throttling.read(self.cores, self.system), on_gpu)
        self.conditions = _between(self._before, after, self.cores, self.system)


def _between(before: _Reading, after: _Reading, cores: frozenset[int], system: Path) -> Conditions:
    """What happened between two readings."""
    seconds = after.processor.at - before.processor.at
    others, stolen, unknown = contention.contention(before.processor, after.processor)
    thermal, thermal_why = throttling.increase(before.slowdowns.thermal, after.slowdowns.thermal)
    quota, quota_why = throttling.increase(before.slowdowns.quota, after.slowdowns.quota)
    clock, clock_why = throttling.clock_mhz(cores, system)
    joules, source, joules_why = _energy(before, after, seconds, system)
    why = {
        "contention_cores": unknown,
        "steal_cores": (unknown or "this kernel does not tell steal") if stolen is None else None,
        "throttle_events": thermal_why,
        "quota_throttled_seconds": quota_why,
        "clock_mhz": clock_why,
        "energy_joules": joules_why,
    }
    started, ended = before.gpu or _NO_GPU, after.gpu or _NO_GPU
    gpu_figures = ("gpu_cotenants", "gpu_throttle", "gpu_clock_mhz")
    why |= {name: ended.why.get(name, started.why.get(name)) for name in gpu_figures}
    known = started.throttle is not None and ended.throttle is not None
    return Conditions(
        seconds=seconds,
        cores=len(cores),
        contention_cores=others,
        steal_cores=stolen,
        throttle_events=None if thermal is None else round(thermal),
        quota_throttled_seconds=quota,
        clock_mhz=clock,
        gpu_cotenants=None if started.others is None or ended.others is None else max(started.others, ended.others),
        gpu_throttle=tuple(dict.fromkeys((started.throttle or ()) + (ended.throttle or ()))) if known else None,
        gpu_clock_mhz=ended.clock_mhz,
        energy_joules=joules,
        energy_source=source,
        why={name: reason for name, reason in why.items() if reason},
    )


_NO_GPU = gpu.GpuReading(why=dict.fromkeys(("gpu_cotenants", "gpu_throttle", "gpu_clock_mhz"), "no GPU is used"))


def _energy(
    before: _Reading, after: _Reading, seconds: float, system: Path
) -> tuple[float | None, str | None, str | None]:
    """(joules, their source, None), or (None, None, why not): null if what computes has no counter."""
    joules, source, why = energy.joules(before.energy, after.energy, seconds, system)
    if before.gpu is None or after.gpu is None:
        return joules, source, why
    if before.gpu.millijoules is None or after.gpu.millijoules is None:
        return None, None, after.gpu.why.get("energy") or before.gpu.why.get("energy")
    if after.gpu.millijoules < before.gpu.millijoules:
        return None, None, "the GPU's energy counter was reset meanwhile"
    on_gpu = (after.gpu.millijoules - before.gpu.millijoules) / 1000
    return on_gpu + (joules or 0.0), "NVML" if source is None else f"{source} + NVML", None


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
