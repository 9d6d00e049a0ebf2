import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten import peak

MIB = 2**20


@pytest.mark.skipif(not os.access(peak.CLEAR_REFS, os.W_OK), reason="this system does not let a peak be reset")
def test_the_peak_keeps_what_was_held_until_it_is_reset():
    assert peak.reset_peak()
    before, _ = peak.peak_bytes()
    with mmap.mmap(-1, 64 * MIB) as block:  # not from the heap, which may hold what earlier tests freed
        block.write(b"x" * (64 * MIB))
    held, why = peak.peak_bytes()
    assert why is None
    assert held - before > 50 * MIB
    peak.reset_peak()
    after, _ = peak.peak_bytes()
    assert after < held - 50 * MIB


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch):
    monkeypatch.setattr(peak, "STATUS", Path("/nonexistent"))
    held, why = peak.peak_bytes()
    assert why is None
    assert held > MIB


def test_a_peak_that_cannot_be_read_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(peak, "STATUS", Path("/nonexistent"))
    monkeypatch.setitem(sys.modules, "resource", None)
    held, why = peak.peak_bytes()
    assert held is None
    assert "getrusage" in why


def test_a_peak_that_may_not_be_reset_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "CLEAR_REFS", tmp_path / "no" / "such" / "file")
    assert peak.reset_peak() is False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
def test_processes_that_were_started_count_while_they_live():
    hold = f"block = b'x' * {64 * MIB}; print('held', flush=True); input()"
    before, _ = peak.peak_bytes()
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        during, _ = peak.peak_bytes()
        child.communicate(b"\n")
    after, _ = peak.peak_bytes()
    assert during - before > 64 * MIB
    assert after < during - 60 * MIB
