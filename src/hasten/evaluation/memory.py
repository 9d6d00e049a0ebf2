"""Peak memory of this process: the most physical memory it held at once (resident set size).

Linux keeps the high-water mark as `VmHWM` in /proc/self/status and lets a process reset it (proc(5),
`clear_refs` value 5). `ru_maxrss` is the fallback elsewhere; it cannot be reset and, on Linux, starts
at what the parent held when it started this process, so `VmHWM` comes first.
"""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start the high-water mark anew at what is held now; False where the system does not allow it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> tuple[int | None, str | None]:
    """(bytes, None), or (None, why it could not be read)."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, None
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None, f"{sys.platform} has neither /proc/self/status nor getrusage"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return (peak * unit, None) if peak > 0 else (None, "getrusage reports no peak")
