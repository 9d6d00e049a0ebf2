"""Peak memory: the most that this process held at once, on GPUs (in physical memory: `hasten.peak`).

On a GPU nobody keeps the high-water mark of a process unless it allocates through torch, which counts
what it gave out. Otherwise NVML tells what the process holds at the moment; read after the last request
and before closing, that is the peak for engines that allocate weights, cache and workspace when they
load and keep them. `source` says which of the two it is.

Engines reserve a cache for keys and values (KV) of the longest context they were told of, whatever a
request needs, so the peak is also told without it (`apart_from_kv`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.evaluation.contention import family
from hasten.evaluation.gpu import Gpus


@dataclass(frozen=True)
class GpuMemory:
    """bytes: None if unknown, then `why` says the reason. source: how it was read."""

    bytes: int | None
    source: str | None = None
    why: str | None = None


def gpu_bytes(devices: Sequence[str]) -> GpuMemory:
    """The most that this process held on an engine's CUDA devices; call it before the session is closed."""
    cuda = [device for device in devices if device.startswith("cuda")]
    gpus = Gpus.of(cuda)
    if gpus is None:
        return GpuMemory(None, why="no GPU is used")
    torch: Any = sys.modules.get("torch")  # loaded only if the engine did
    if torch is not None and torch.cuda.is_initialized():
        allocated = sum(int(torch.cuda.max_memory_allocated(device)) for device in cuda)
        if allocated > 0:
            return GpuMemory(allocated, "torch.cuda.max_memory_allocated (without the CUDA context)")
    held, why = gpus.memory_bytes(family(Path("/proc"), os.getpid()))
    return GpuMemory(held, None if held is None else "NVML, held after the last request", why)


def apart_from_kv(peak_bytes: int | None, kv_bytes: int | None) -> tuple[int | None, str | None]:
    """(peak without the reserved KV cache, None), or (None, why not), both in bytes.

    Pages of a reserved cache that nobody has touched are not resident: where the cache is larger than the whole peak,
    it cannot be told apart.
    """
    if peak_bytes is None:
        return None, "the peak is unknown"
    if kv_bytes is None:
        return None, "the engine does not tell the size of its KV cache"
    if kv_bytes > peak_bytes:
        return None, f"the KV cache was reserved ({kv_bytes} bytes) but not all of it was touched (peak {peak_bytes})"
    return peak_bytes - kv_bytes, None
