import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import contention
from hasten.evaluation.contention import Contention, own_seconds, share


@given(elapsed=st.floats(0.1, 1e3), own=st.floats(0, 1e4), others=st.floats(0, 1e4))
def test_contention_is_what_others_used_per_second(elapsed, own, others):
    cores, why = share(elapsed, own + others, own)
    assert why is None
    assert cores == pytest.approx(others / elapsed, abs=1e-6)


def test_counters_a_little_behind_do_not_give_negative_contention():
    assert share(1.0, 0.98, 1.0) == (0.0, None)


def test_counters_that_do_not_move_are_unknown_not_quiet():
    cores, why = share(1.0, 0.0, 1.0)
    assert cores is None
    assert why is not None and "do not include this process" in why


def test_other_processes_are_seen(monkeypatch):
    busy, own = iter([100.0, 103.0]), iter([50.0, 51.0])
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(contention, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(contention, "own_seconds", lambda: next(own))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Contention()
    with watch:
        pass
    assert watch.cores == pytest.approx(0.5)


def test_own_work_is_counted_as_own():
    before, end = own_seconds(), time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert 0.15 < own_seconds() - before < 1.0
