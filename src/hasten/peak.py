"""The most memory that this process, and those it started, held at once.

That is physical memory (resident set size), of which no page is left out.

Linux keeps the high-water mark as `VmHWM` in /proc/self/status and lets a process reset it (proc(5),
`clear_refs` value 5). `ru_maxrss` is the fallback elsewhere; it cannot be reset and, on Linux, starts
at what the parent held when it started this process, so `VmHWM` comes first.

Counted are pages that the process has written (anonymous) and pages of files that it has mapped and read, though the
system could take those back at any time: a tensor that is a view of a safetensors file counts once it was touched.
Of several processes (vLLM computes in others) each one's mark is added: pages that they share count in each.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from contextlib import suppress
from pathlib import Path

import psutil

PROC = Path("/proc")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
LARGE_BYTES = 5 * 2**18


def reset_peak() -> bool:
    """Start the high-water mark anew at what is held now; False where the system does not allow it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    for pid in started():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            (PROC / f"{pid}/clear_refs").write_text("5")
    return True


def started() -> list[int]:
    """The processes that this one started and that are still there, and those that they started."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def mark(status: Path) -> int | None:
    """`VmHWM` in bytes, None where there is none (in a process that ended, for one)."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def peak_bytes() -> tuple[int | None, str | None]:
    """(bytes, None), or (None, why it could not be read)."""
    if own := mark(STATUS):
        return own + sum(mark(PROC / f"{pid}/status") or 0 for pid in started()), None
    try:
        import resource
    except ImportError:
        return None, f"{sys.platform} has neither /proc/self/status nor getrusage"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return (peak * unit, None) if peak > 0 else (None, "getrusage reports no peak")


def return_freed_memory() -> None:
    """Let every large block go back to the system as soon as it is freed, where glibc allocates.

    By default it moves the size from which it does so up to 32 MB, as blocks are freed (`mallopt(3)`); smaller ones are
    then cut from a heap that keeps what lies between two blocks that live on.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, LARGE_BYTES)  # M_MMAP_THRESHOLD: set, it no longer moves
