"""Real processes: a small Python that holds memory, and its children."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hasten.evaluation import tree
from hasten.evaluation.tree import ProcTree, PsutilTree, process_tree

MIB = 2**20
HOLD = """
import mmap, os, subprocess, sys, time
shared = mmap.mmap(-1, 32 * 2**20)
shared.write(b"x" * len(shared))
if os.fork() == 0:
    assert sum(shared[::4096]) > 0
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(600)
if "stray" in sys.argv:
    os.write(1, b"%d\\n" % subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
time.sleep(600)
"""
linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="this system has no /proc")


@pytest.fixture
def holding():
    """(process, ids of its children), as often as asked."""
    begun = []

    def start(*arguments: str):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        children = [int(process.stdout.readline()) for _ in ("fork", *arguments)]
        begun.append((process, children))
        return process, children

    yield start
    for process, children in begun:
        for pid in (process.pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", [pytest.param(ProcTree, marks=linux), PsutilTree])
def test_a_tree_is_a_process_with_all_it_started(holding, kind):
    process, children = holding("stray")
    found = kind(process.pid)
    assert found.members() == sorted([process.pid, *children])
    assert found.resident_bytes() > 2 * 32 * MIB
    found.close()


@linux
def test_memory_that_processes_share_can_be_counted_once(holding):
    process, _ = holding()
    found = ProcTree(process.pid)
    resident, proportional = found.resident_bytes(), found.proportional_bytes()
    assert proportional is not None
    assert 32 * MIB < proportional < resident - 25 * MIB
    found.close()
    assert PsutilTree(process.pid).proportional_bytes() is None


@linux
def test_what_has_ended_no_longer_counts(holding):
    process, (child,) = holding()
    found = ProcTree(process.pid)
    both = found.resident_bytes()
    os.kill(child, 9)
    process_ended(child)
    assert found.resident_bytes() < both - 30 * MIB
    os.kill(process.pid, 9)
    process.wait()
    assert found.resident_bytes() == 0
    found.close()


@linux
def test_a_child_that_came_later_is_found(holding, monkeypatch):
    monkeypatch.setattr(tree, "SCAN_SECONDS", 0.0)
    found = ProcTree(os.getpid())
    before = found.resident_bytes()
    holding()
    assert found.resident_bytes() > before + 2 * 32 * MIB
    found.close()


@linux
def test_only_what_was_started_since_is_looked_at(holding, monkeypatch):
    monkeypatch.setattr(tree, "SCAN_SECONDS", 0.0)
    monkeypatch.setattr(tree, "MOST_NEW", 10**7)  # whatever else is started here meanwhile
    looked = []
    found = ProcTree(os.getpid())
    family = found._family
    monkeypatch.setattr(found, "_family", lambda pids: looked.append(list(pids)) or family(looked[-1]))
    older = set(psutil.pids())
    found.resident_bytes()
    process, children = holding()
    found.resident_bytes()
    assert {process.pid, *children} <= set(looked[-1])
    assert not older & set(looked[-1])
    monkeypatch.setattr(tree, "MOST_NEW", -1)
    found.resident_bytes()
    assert os.getpid() in looked[-1]
    found.close()


@linux
def test_threads_are_not_counted_as_processes(monkeypatch):
    monkeypatch.setattr(tree, "SCAN_SECONDS", 0.0)
    found = ProcTree(os.getpid())
    before = found.resident_bytes()
    ended = threading.Event()
    threads = [threading.Thread(target=ended.wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert found.resident_bytes() < 1.5 * before
    ended.set()
    for thread in threads:
        thread.join()
    found.close()


def test_every_system_has_a_tree():
    found = process_tree(os.getpid())
    assert found.resident_bytes() > MIB
    assert os.getpid() in found.members()
    found.close()


def process_ended(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/statm").read_text().split()[1] != "0":
        assert time.monotonic() < deadline
        time.sleep(0.01)
