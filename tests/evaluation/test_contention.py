import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.evaluation import contention
from hasten.evaluation.contention import (
    Process,
    ProcessorTime,
    family,
    own_seconds,
    parse_process,
    parse_stat,
    read,
    share,
)
from tests.evaluation import trees

PROC = Path("/proc")
BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
needs_proc = pytest.mark.skipif(not (PROC / "self/stat").exists(), reason="needs Linux' /proc")
ticks = st.integers(0, 10**9)


@given(seconds=st.floats(0.1, 1e3), own=st.floats(0, 1e4), others=st.floats(0, 1e4))
def test_contention_is_what_others_used_per_second(seconds, own, others):
    cores, why = share(seconds, own + others, own)
    assert why is None
    assert cores == pytest.approx(others / seconds, abs=1e-6)


def test_counters_a_little_behind_do_not_give_negative_contention():
    assert share(1.0, 0.98, 1.0) == (0.0, None)


def test_counters_that_do_not_move_are_unknown_not_quiet():
    cores, why = share(1.0, 0.0, 1.0)
    assert cores is None
    assert "do not include this process" in why


def test_a_pause_shorter_than_a_tick_is_quiet_not_unknown():
    assert share(0.1, 0.0, 0.009) == (0.0, None)


@given(cores=st.lists(st.tuples(*[ticks] * 10), min_size=1, max_size=8), data=st.data())
def test_busy_and_stolen_are_those_of_the_watched_cores(cores, data):
    watched = data.draw(st.sets(st.integers(0, len(cores) - 1), min_size=1))
    busy, stolen = parse_stat(trees.stat(*cores), watched)
    user, nice, system, _idle, _iowait, irq, softirq, steal, _guest, _guest_nice = map(
        sum, zip(*(cores[number] for number in watched), strict=True)
    )
    assert busy == pytest.approx((user + nice + system + irq + softirq) / 100)
    assert stolen == pytest.approx(steal / 100)


def test_a_kernel_without_steal_tells_busy_alone():
    assert parse_stat("cpu 9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7\n", {0}) == (pytest.approx(0.19), None)


@pytest.mark.parametrize("text", ["", "intr 5\n", "cpu 1 2 3 4 5 6 7 8\n", "cpu0 1 2 3\n"])
def test_cores_that_nobody_tells_of_are_unknown(text):
    assert parse_stat(text, {0}) == (None, None)


@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=15),
    parent=st.integers(0, 2**22),
    ran=ticks,
    reaped=ticks,
    started=ticks,
)
def test_a_process_is_parsed_whatever_its_name(name, parent, ran, reaped, started):
    text = trees.process(7, parent, ran=ran, reaped=reaped, started=started, name=name)
    found, process = parse_process(text)
    assert found == parent
    assert (process.ran, process.reaped, process.started) == pytest.approx((ran / 100, reaped / 100, started / 100))


@given(st.text(max_size=200))
def test_any_other_text_is_refused(text):
    try:
        parse_process(text)
    except ValueError:
        return
    assert ")" in text


def grow(root: Path, *, listed: bool) -> Path:
    """10 has the child 11 and, from another thread, 12; 12 has 13; 20 is a stranger's, and so is its child 21."""
    parents = {10: 1, 11: 10, 12: 10, 13: 12, 20: 1, 21: 20}
    files: dict[str, object] = {f"{pid}/stat": trees.process(pid, parent) for pid, parent in parents.items()}
    if listed:
        files |= {f"{pid}/task/{pid}/children": "" for pid in parents}
        files |= {"10/task/10/children": "11 ", "10/task/15/children": "12 ", "12/task/12/children": "13 "}
    return trees.write(root, {**files, "self/stat": "", "uptime": "5.0 9.0\n"})


@pytest.mark.parametrize("listed", [True, False], ids=["children listed", "children found by their parents"])
def test_the_family_is_all_descendants(tmp_path, listed):
    assert family(grow(tmp_path, listed=listed), 10) == {10, 11, 12, 13}


def test_a_process_that_is_gone_is_its_own_family(tmp_path):
    assert family(tmp_path / "none", 10) == {10}


def reading(since_boot: float, **own: Process) -> ProcessorTime:
    return ProcessorTime(since_boot, since_boot, 0.0, 0.0, {int(name[1:]): process for name, process in own.items()})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # The parent and a child, both running on.
        ({"p1": Process(0, 5, 0), "p2": Process(1, 2, 0)}, {"p1": Process(0, 6, 0), "p2": Process(1, 4.5, 0)}, 3.5),
        # A child that started meanwhile and still lives.
        ({"p1": Process(0, 5, 0)}, {"p1": Process(0, 5, 0), "p3": Process(101, 2, 0)}, 2.0),
        # A child that started and ended meanwhile: only its parent tells.
        ({"p1": Process(0, 5, 1)}, {"p1": Process(0, 5, 4)}, 3.0),
        # A child that ended: what it ran before does not count.
        ({"p1": Process(0, 5, 0), "p2": Process(1, 2, 0)}, {"p1": Process(0, 5, 2.75)}, 0.75),
        # A child that ended and nobody of us waited for: never negative.
        ({"p1": Process(0, 5, 0), "p2": Process(1, 2, 0)}, {"p1": Process(0, 6, 0)}, 1.0),
        # Its number was given to a new child.
        ({"p1": Process(0, 5, 0), "p2": Process(1, 2, 0)}, {"p1": Process(0, 5, 2.5), "p2": Process(101, 1, 0)}, 1.5),
        # One that the first reading missed: what it ran before cannot be told.
        ({"p1": Process(0, 5, 0)}, {"p1": Process(0, 6, 0), "p4": Process(50, 30, 0)}, 1.0),
    ],
)
def test_own_time_holds_whoever_comes_and_goes(before, after, expected):
    assert own_seconds(reading(100.0, **before), reading(110.0, **after)) == pytest.approx(expected)


@needs_proc
def test_work_of_this_process_and_of_a_living_child_is_own():
    child = subprocess.Popen([sys.executable, "-c", BURN.format(0.3) + "time.sleep(60)"])
    try:
        before = read({0})
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        deadline = time.monotonic() + 20
        while (contention.cpu_clock(child.pid) or 0) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0.45 < own_seconds(before, read({0}, known=before.own)) < 1.0
    finally:
        child.kill()
        child.wait()


@needs_proc
def test_work_of_a_child_that_has_ended_is_own():
    before = read({0})
    subprocess.run([sys.executable, "-c", BURN.format(0.3)], check=True)
    assert 0.28 < own_seconds(before, read({0}, known=before.own)) < 1.0


@needs_proc
def test_a_grandchild_whose_parent_ended_still_counts():
    """It has another parent now, but the reading before knew it."""
    script = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {BURN.format(60)!r}])\ninput()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while len(family(PROC, child.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    before = read({0})
    (orphan,) = family(PROC, child.pid) - {child.pid}
    try:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
        while contention.cpu_clock(orphan) is not None and time.monotonic() < deadline:
            after = read({0}, known=before.own)
            if orphan in after.own and own_seconds(before, after) > 0.2:
                return
            time.sleep(0.01)
        pytest.fail("the orphan's time was not counted")
    finally:
        os.kill(orphan, 9)


@needs_proc
def test_a_stranger_is_no_family():
    assert os.getppid() not in family(PROC, os.getpid())


def test_a_system_without_stat_is_unknown_with_the_reason(tmp_path):
    before, after = read({0}, tmp_path), read({0}, tmp_path)
    cores, stolen, why = contention.contention(before, after)
    assert (cores, stolen) == (None, None)
    assert "/proc/stat" in why


def test_without_a_cpu_clock_ticks_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(contention, "cpu_clock", lambda pid: None)
    monkeypatch.setattr(os, "getpid", lambda: 10)
    own = read({0}, trees.write(tmp_path, {"proc/10/stat": trees.process(10, 1, ran=250, started=7)})).own
    assert own == {10: Process(pytest.approx(0.07), 2.5, 0.0)}
