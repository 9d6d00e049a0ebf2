"""What every child has in common; that a worker answers is tested with trials."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hasten.evaluation import process
from hasten.evaluation.limits import GIB, Limits
from hasten.evaluation.process import LIVING, Child, EndedError, Guardian, death
from tests.evaluation.trials import alive, wait_until


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1,), "the process ended with exit code 1 before it could report"),
        ((1, "loading"), "the process ended with exit code 1 while loading"),
        ((-6,), "the process crashed (SIGABRT)"),
        ((-60,), "the process crashed (signal 60)"),
        ((-9, "loading"), "the process was killed (SIGKILL) while loading, most likely because memory ran out"),
        ((-9, None, True, 3 * GIB), "the kernel killed the process because memory ran out (it held 3 GiB)"),
        ((-9, None, False), "somebody killed the process (SIGKILL); memory had not run out"),
    ],
)
def test_the_end_of_a_process_is_put_in_words(arguments, expected):
    assert death(*arguments) == expected


def python(monkeypatch, code: str, limits: Limits | None = None) -> Child:
    """A child that runs `code`, with `answers` the descriptor to answer on."""
    popen = subprocess.Popen

    def start(command, **options):
        monkeypatch.undo()
        return popen([sys.executable, "-c", f"import os, sys, time\nanswers = {command[-2]}\n{code}"], **options)

    process.GUARDIAN.forget(0)  # it has begun by then, and the next one is the child
    monkeypatch.setattr(process.subprocess, "Popen", start)
    return Child(limits or Limits(20.0), None, dict(os.environ))


def test_an_answer_may_come_in_pieces_and_several_at_once(monkeypatch):
    code = """
half = b': 1}\\n{"doing": "one"}\\n{"b": 2}\\n{"doing": "two"}\\n{"c"'
for piece in (b'{"a"', half, b': "' + b'x' * 10**7 + b'"}\\n'):
    while piece:
        piece = piece[os.write(answers, piece):]
    time.sleep(0.05)
time.sleep(60)
"""
    with python(monkeypatch, code) as child:
        deadline = time.monotonic() + 20
        assert child.receive(deadline) == {"a": 1}
        assert child.receive(deadline) == {"b": 2}
        assert len(child.receive(deadline)["c"]) == 10**7
        assert child.doing is None
        with pytest.raises(EndedError, match="it was still running after 20 s"):
            child.receive(time.monotonic())


def test_an_answer_that_came_before_a_crash_or_late_counts(monkeypatch):
    code = 'os.write(answers, b\'{"a": 1}\\n\'); os.write(answers, b\'{"doing": "tidying up"}\\n{\'); os._exit(3)'
    with python(monkeypatch, code) as child:
        wait_until(lambda: not alive(child.pid))
        late = time.monotonic() - 10
        assert child.receive(late) == {"a": 1}
        with pytest.raises(EndedError, match="exit code 3 while tidying up"):
            child.receive(late)


def test_what_is_no_answer_ends_it(monkeypatch):
    child = python(monkeypatch, "os.write(answers, b'hello\\n'); time.sleep(60)")
    with child, pytest.raises(EndedError, match="an answer that is not JSON: b'hello'"):
        child.receive(time.monotonic() + 20)
    assert not alive(child.pid)


def test_a_child_that_closes_its_pipe_and_goes_on_is_waited_for(monkeypatch):
    child = python(monkeypatch, "os.close(answers); time.sleep(0.3); os._exit(4)")
    with child, pytest.raises(EndedError, match="exit code 4"):
        child.receive(time.monotonic() + 20)


def test_its_descendants_cannot_keep_a_dead_child_s_pipe_open(monkeypatch):
    code = "time.sleep(60 if os.fork() == 0 else 0.2); os._exit(5)"
    with python(monkeypatch, code) as child:
        begun = time.monotonic()
        with pytest.raises(EndedError, match="exit code 5"):
            child.receive(begun + 20)
        assert time.monotonic() - begun < 5


def test_a_child_that_does_not_read_does_not_stop_the_one_who_writes(monkeypatch):
    with python(monkeypatch, "time.sleep(60)") as child:
        child.send(b"x" * 10**7)
        with pytest.raises(EndedError, match=r"it was still running after 0\.3 s and was stopped"):
            child.limits = Limits(0.3)
            child.receive(time.monotonic() + 0.3)


def test_a_large_command_arrives_while_the_answer_is_awaited(monkeypatch):
    code = """
size = int.from_bytes(sys.stdin.buffer.read(8), "big")
os.write(answers, b'{"read": %d, "size": %d}\\n' % (len(sys.stdin.buffer.read(size)), size))
time.sleep(60)
"""
    with python(monkeypatch, code) as child:
        child.send(b"x" * 10**7)
        answer = child.receive(time.monotonic() + 20)
        assert answer["read"] == answer["size"] > 10**7


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="this system does not say what is shared")
def test_memory_that_descendants_share_does_not_count_twice(monkeypatch):
    """Two processes with 300 MiB that they share hold less than 400 MiB."""
    code = """
import mmap
shared = mmap.mmap(-1, 300 * 2**20)
for _ in range(300):
    shared.write(b"x" * 2**20)
if os.fork() == 0:
    assert sum(shared[::4096]) > 0
    os.write(answers, b'{"a": 1}\\n')
    time.sleep(60)
sys.stdin.buffer.read(1)
"""
    with python(monkeypatch, code, Limits(20.0, 400 * 2**20)) as child:
        deadline = time.monotonic() + 20
        assert child.receive(deadline) == {"a": 1}
        wait_until(lambda: child.look_after() or child.peak_bytes > 500 * 2**20)
        child.send("end")
        with pytest.raises(EndedError, match="exit code 0"):
            child.receive(deadline)


def test_descendants_count_towards_the_limit(monkeypatch):
    code = """
import subprocess
hold = "import sys, time; sys.stdin.read(); held = b'x' * 150 * 2**20; time.sleep(60)"
started = [subprocess.Popen([sys.executable, "-c", hold], stdin=-1, start_new_session=True) for _ in range(2)]
os.write(answers, b'{"pids": [%d, %d]}\\n' % tuple(one.pid for one in started))
for one in started:
    one.stdin.close()
time.sleep(60)
"""
    with python(monkeypatch, code, Limits(20.0, 200 * 2**20)) as child:
        pids = child.receive(time.monotonic() + 20)["pids"]
        with pytest.raises(EndedError, match=r"it used more than memory_limit_gib \(0.195 GiB\) and was stopped"):
            child.receive(time.monotonic() + 20)
    wait_until(lambda: not any(map(alive, pids)))


def test_nothing_is_left_of_a_closed_child(monkeypatch):
    process.GUARDIAN.forget(0)  # it has begun by then, and stays
    before = open_files()
    child = python(monkeypatch, "time.sleep(60)")
    pid = child.pid
    assert LIVING[pid] is child
    child.close()
    child.close()
    assert pid not in LIVING
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert open_files() == before


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_a_guardian_ends_what_it_watches_when_its_master_ends(monkeypatch):
    guardian = Guardian()
    watched, forgotten = (subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2))
    guardian.watch(watched.pid)
    guardian.watch(forgotten.pid)
    guardian.forget(forgotten.pid)
    guardian._process.communicate()
    assert watched.wait(20) == -9
    assert forgotten.poll() is None
    forgotten.kill()
    forgotten.wait()


def test_a_guardian_that_was_killed_is_replaced():
    guardian = Guardian()
    watched = subprocess.Popen(["sleep", "60"], start_new_session=True)
    guardian.forget(0)
    guardian._process.kill()
    guardian._process.wait()
    guardian.watch(watched.pid)
    guardian._process.communicate()
    assert watched.wait(20) == -9
