"""Energy, from real counters only: RAPL for the processor packages, NVML for GPUs.

RAPL (running average power limit) counts microjoules per processor package in /sys/class/powercap;
the kernel lets root alone read it (CVE-2020-8694 made power a side channel) unless an administrator
opens the file. The counter starts again at 0 after `max_energy_range_uj`. It is the whole package's
energy, whoever used it, without most of the mainboard and, on many machines, without the memory.
A virtual machine has no such counter; then energy is null, never an estimate from a rated power.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MOST_WATTS = 1000.0
"""No processor package draws more: a counter that this could carry around twice says nothing."""
NO_RAPL = "this system has no RAPL energy counter in /sys/class/powercap"


@dataclass(frozen=True)
class Domain:
    """One package's counter. range_microjoules: where it starts again at 0."""

    name: str
    counter: Path
    range_microjoules: int


@dataclass(frozen=True)
class Energy:
    """One reading: microjoules by domain, or why not."""

    microjoules: dict[str, int]
    why: str | None = None


def read(system: Path = Path("/")) -> Energy:
    """All packages' counters, now."""
    found = domains(system)
    if not found:
        return Energy({}, NO_RAPL)
    try:
        return Energy({domain.name: int(domain.counter.read_text()) for domain in found})
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no number"
        return Energy({}, f"the RAPL energy counter could not be read: {reason}")


def joules(
    before: Energy, after: Energy, seconds: float, system: Path = Path("/")
) -> tuple[float | None, str | None, str | None]:
    """(joules between two readings, the domains they are of, None), or (None, None, why not)."""
    why = before.why or after.why
    if why:
        return None, None, why
    total = 0
    for domain in domains(system):
        if seconds * MOST_WATTS * 1e6 >= domain.range_microjoules:
            return None, None, f"{domain.name}'s counter may have started again more than once in {seconds:.0f} s"
        total += spent(before.microjoules[domain.name], after.microjoules[domain.name], domain.range_microjoules)
    return total / 1e6, "RAPL " + " ".join(sorted(after.microjoules)), None


def spent(before: int, after: int, limit: int) -> int:
    """Counts between two readings of a counter that starts again at 0 after `limit`."""
    return after - before if after >= before else after + limit + 1 - before


@lru_cache(maxsize=8)
def domains(system: Path = Path("/")) -> tuple[Domain, ...]:
    """The packages' domains: without the parts of a package (core, dram), the whole platform (psys), and duplicates.

    The same package can show up twice, through a model-specific register and through memory (`intel-rapl-mmio`).
    """
    found: dict[str, Domain] = {}
    for folder in sorted((system / "sys/class/powercap").glob("*rapl*:*")):
        if folder.name.count(":") != 1:
            continue
        try:
            name = (folder / "name").read_text().strip()
            limit = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        if name.startswith("package") and limit > 0:
            # In sorted order `intel-rapl:0` follows `intel-rapl-mmio:0`, and replaces it.
            found[name] = Domain(name, folder / "energy_uj", limit)
    return tuple(found[name] for name in sorted(found))
