"""A machine's /proc and /sys as files, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write(root: Path, files: Mapping[str, object]) -> Path:
    """Text files below `root`, by path."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


def stat(*cores: tuple[int, ...]) -> str:
    """/proc/stat of some cores, in ticks: user nice system idle iowait irq softirq steal guest guest_nice."""
    total = [sum(column) for column in zip(*cores, strict=True)]
    lines = [f"cpu  {' '.join(map(str, total))}"]
    lines += [f"cpu{number} {' '.join(map(str, core))}" for number, core in enumerate(cores)]
    return "\n".join([*lines, "intr 7 0 1 cpu0", "ctxt 99", "btime 1700000000", ""])


def core(busy: int = 0, steal: int = 0, idle: int = 0) -> tuple[int, ...]:
    """One core's ticks."""
    return (busy, 0, 0, idle, 0, 0, 0, steal, 0, 0)


def process(pid: int, parent: int, *, ran: int = 0, reaped: int = 0, started: int = 0, name: str = "worker") -> str:
    """/proc/PID/stat, in ticks."""
    return (
        f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194304 9 0 0 0 {ran} 0 {reaped} 0 20 0 1 0 {started} 3133440 408"
    )


def rapl(root: Path, folder: str, name: str, microjoules: int, limit: int = 262143328850) -> None:
    """One powercap domain."""
    base = f"sys/class/powercap/{folder}"
    write(root, {f"{base}/name": f"{name}\n", f"{base}/energy_uj": microjoules, f"{base}/max_energy_range_uj": limit})
