import sys
from pathlib import Path

import pytest

from hasten.evaluation import memory

MIB = 2**20


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="the peak can be reset on Linux only")
def test_the_peak_keeps_what_was_held_until_it_is_reset():
    if not memory.reset_peak():
        pytest.skip("this system does not allow a process to reset its peak")
    before, _ = memory.peak_bytes()
    block = b"x" * (64 * MIB)
    del block
    peak, why = memory.peak_bytes()
    assert why is None
    assert peak - before > 50 * MIB
    memory.reset_peak()
    after, _ = memory.peak_bytes()
    assert after < peak - 50 * MIB


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch):
    monkeypatch.setattr(memory, "STATUS", Path("/nonexistent"))
    peak, why = memory.peak_bytes()
    assert why is None
    assert peak > MIB


def test_a_peak_that_cannot_be_read_is_null_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "STATUS", Path("/nonexistent"))
    monkeypatch.setitem(sys.modules, "resource", None)
    peak, why = memory.peak_bytes()
    assert peak is None
    assert "getrusage" in why


def test_a_peak_that_may_not_be_reset_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "such" / "file")
    assert memory.reset_peak() is False
