"""What machine this is: identity only, no measured figures (noise would re-run everything).

`python pipelines/probe.py` writes one file per engine, `artifacts/machine/<engine>.json`, with the
machine and the versions of the libraries that decide that engine's speed. A trial depends on its
engine's file, so a new library or machine re-runs exactly the trials it concerns.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)
"""What numeric libraries read when they start: every engine gets the same threads."""


def cpu_count() -> int:
    """Cores this process may use: its affinity, and its container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit, _, period = quota.read_text().partition(" ") if quota.exists() else ("max", "", "")
    return allowed if limit == "max" else max(1, min(allowed, math.ceil(int(limit) / int(period))))


def cores(count: int, allowed: Collection[int] | None = None, system: Path = Path("/")) -> list[int] | None:
    """The `count` cores every worker is confined to, sorted: the first allowed ones, each physical core once first.

    As many as its engine has threads, so that no engine gains by spreading over more than it was given. Fewer if fewer
    are allowed. None where the system cannot confine a process.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    seen: set[str] = set()
    first: list[int] = []
    siblings: list[int] = []
    for core in sorted(os.sched_getaffinity(0) if allowed is None else allowed):
        try:
            physical = (system / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            physical = str(core)
        (siblings if physical in seen else first).append(core)
        seen.add(physical)
    return sorted([*first, *siblings][:count])


def cpu_name() -> str:
    """The processor's model name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The vector extensions that decide which kernels run."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wanted = ("avx", "fma", "f16c", "amx")
    return sorted(flag for flag in flags if flag.startswith(wanted))


def gpu_names() -> list[str]:
    """CUDA devices by name, found without importing torch (empty where there are none)."""
    root = Path("/proc/driver/nvidia/gpus")
    files = sorted(root.glob("*/information")) if root.exists() else []
    lines = [line for file in files for line in file.read_text().splitlines() if line.startswith("Model:")]
    return [line.split(":", 1)[1].strip() for line in lines]


def machine() -> dict[str, Any]:
    """Identity of this machine; `id` is a short hash of the rest."""
    facts: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "cores": cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu_names(),
    }
    return {"id": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12], **facts}


def libraries(names: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions, null for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where glibc allocates: by default every large tensor is given back to the
    system and comes again page by page, filled with zeros, a twentieth of a training step (`mallopt(3)`).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself, so all comes from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
