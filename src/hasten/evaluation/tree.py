"""A process with everything it started: who they are and how much memory they hold.

Cheap enough to ask while something is timed: the files in /proc stay open and reading one takes a
microsecond; who belongs to the tree is looked up again at most twice a second, and only among the numbers
that the kernel has given out since (the last field of /proc/loadavg, proc(5)).

Adding up resident sets counts memory that processes share once for each of them. Where that matters,
proportional sets (`smaps_rollup`, proc(5)) divide each shared page by the number of its users, so they
add up to what is really held. Reading them walks page tables (milliseconds), so only who needs it does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import psutil

from hasten.evaluation.contention import stat_fields

SCAN_SECONDS = 0.5
"""Who belongs to a tree is looked up at most this often."""
MOST_NEW = 500
"""When so many processes and threads were started meanwhile, all of /proc is read instead."""


class Tree(Protocol):
    """A process, the first of its session, and all its descendants."""

    def resident_bytes(self) -> int:
        """The physical memory all of them hold; what they share is counted for each."""
        ...

    def proportional_bytes(self) -> int | None:
        """The same with shared memory counted once; None where the system does not say."""
        ...

    def members(self) -> list[int]:
        """Their process ids, looked up now."""
        ...

    def close(self) -> None:
        """Let go of it; nothing is ended."""
        ...


def process_tree(pid: int) -> Tree:
    """The tree below `pid`."""
    return ProcTree(pid) if Path("/proc/self/statm").is_file() else PsutilTree(pid)


class ProcTree:
    """Through /proc. An open file there stays with its process: a number given to another one later does not matter."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._files = {pid: os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)}
        self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        self._newest = pid  # what it starts comes later
        self._looked = float("-inf")

    def resident_bytes(self) -> int:
        self._look_up()
        total = 0
        for pid, file in list(self._files.items()):
            try:
                total += int(os.pread(file, 256, 0).split()[1]) * self._page_bytes
            except (OSError, IndexError):  # it has ended
                os.close(self._files.pop(pid))
        return total

    def proportional_bytes(self) -> int | None:
        total = 0
        for pid in self._files:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            except OSError:
                return None
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total or None

    def members(self) -> list[int]:
        return self._family(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())

    def _family(self, pids: Iterable[int]) -> list[int]:
        """Those among `pids` that belong to the tree, as descendants of what is known or as part of the session."""
        found = {self.pid, *(pid for pid, file in self._files.items() if _lives(file))}
        parents: dict[int, int] = {}
        for pid in pids:
            try:
                fields = stat_fields(_read(f"/proc/{pid}/stat").decode(errors="replace"))
            except (OSError, ValueError):
                continue
            parents[pid] = int(fields[1])
            if int(fields[3]) == self.pid:  # of its session, even if its parent has ended
                found.add(pid)
        more = found
        while more:
            more = {pid for pid, parent in parents.items() if parent in more} - found
            found |= more
        return sorted(found & parents.keys())

    def close(self) -> None:
        for file in (self._load, *self._files.values()):
            os.close(file)
        self._files.clear()

    def _look_up(self) -> None:
        """Open what is new: what has a number above the one that the kernel gave out last when we looked before."""
        now = time.monotonic()
        if now - self._looked < SCAN_SECONDS:
            return
        newest = int(os.pread(self._load, 256, 0).split()[-1])
        if not 0 <= newest - self._newest <= MOST_NEW:
            found = self.members()
        else:  # numbers go to threads, too
            found = [pid for pid in self._family(range(self._newest + 1, newest + 1)) if _is_process(pid)]
        for pid in found:
            if pid not in self._files:
                try:
                    self._files[pid] = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
                except OSError:  # it has ended
                    continue
        self._newest, self._looked = newest, now


def _read(name: str) -> bytes:
    """A small file of /proc; several times faster than `Path.read_bytes`."""
    file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)


def _lives(file: int) -> bool:
    try:
        return bool(os.pread(file, 1, 0))
    except OSError:
        return False


def _is_process(pid: int) -> bool:
    """Whether a number is a process' own, not that of one of its threads."""
    try:
        return f"\nTgid:\t{pid}\n".encode() in _read(f"/proc/{pid}/status")
    except OSError:
        return False


class PsutilTree:
    """Where there is no /proc."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._members: list[psutil.Process] = []
        self._looked = float("-inf")

    def resident_bytes(self) -> int:
        if time.monotonic() - self._looked >= SCAN_SECONDS:
            self._look_up()
        total = 0
        for process in self._members:
            try:
                total += int(process.memory_info().rss)
            except psutil.Error:  # it has ended
                continue
        return total

    def proportional_bytes(self) -> int | None:
        return None

    def members(self) -> list[int]:
        self._look_up()
        return sorted(process.pid for process in self._members)

    def close(self) -> None:
        self._members.clear()

    def _look_up(self) -> None:
        self._looked = time.monotonic()
        try:
            root = psutil.Process(self.pid)
            self._members = [root, *root.children(recursive=True)]
        except psutil.Error:
            self._members = []
