from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from hasten import devices
from hasten.devices import Cpu, Cuda, pair_of, product, within

SMALL = 2**21


@pytest.fixture(autouse=True)
def _own_affinity_back() -> object:
    """A `Cpu` confines its process, and torch's threads are the process' too."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    """Two threads, 2 MiB at most, short turns."""
    monkeypatch.setattr(devices, "WORKING_SETS", (2**18, SMALL))
    monkeypatch.setattr(devices, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(devices, "CALL_BYTES", 2**22)
    return Cpu(2)


def test_a_turn_reads_at_a_speed_that_memory_can_have(cpu: Cpu) -> None:
    for size in cpu.working_sets:
        turn = cpu.read(size)
        assert 1e8 < turn.rate < 1e13
        assert 0 < turn.share <= 1.05
        assert turn.quiet == (turn.share >= 0.97)


def test_every_thread_owns_a_slice_that_was_written(cpu: Cpu) -> None:
    slices = cpu._slices
    assert [part.numel() * 8 for part in slices] == [SMALL // 2] * 2
    assert slices[0].data_ptr() != slices[1].data_ptr()
    assert all(int(part.sum()) == part.numel() for part in slices)  # pages never written would all be one page of zeros


def test_memory_is_private_and_aligned_as_engines_have_it(cpu: Cpu) -> None:
    """Shared memory, Python's default, gets no large pages where the system gives them to private memory."""
    address = cpu._slices[0].data_ptr()
    assert address % 2**21 == 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.split()[1] == "rw-p"
            return
    pytest.fail("the slice is in no mapping")


def test_each_pass_really_reads_the_slice(cpu: Cpu) -> None:
    """The view that repeats a slice must not be folded into one pass: n passes take n times as long."""
    part = torch.ones(2**20, dtype=torch.int64)  # 8 MiB
    torch.set_num_threads(1)

    def seconds(passes: int) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            total = part.expand(passes, -1).sum(dim=1)
            times.append(time.perf_counter() - start)
            assert total.tolist() == [2**20] * passes
        return min(times)

    assert seconds(16) > 6 * seconds(1)


def test_threads_stay_on_their_cores(cpu: Cpu) -> None:
    seen: list[set[int]] = [set(), set()]
    cpu._each(lambda index: seen[index].update(os.sched_getaffinity(threading.get_native_id())))
    assert seen == [{core} for core in cpu.cores]


def test_only_the_cores_that_were_given_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "WORKING_SETS", (2**18,))
    last = max(os.sched_getaffinity(0))
    assert Cpu(2, [last]).cores == [last, last]
    assert os.sched_getaffinity(0) == {last}


def test_what_fails_in_a_thread_is_raised(cpu: Cpu) -> None:
    def fails(index: int) -> None:
        if index == 1:
            raise ValueError("thread 1")

    with pytest.raises(ValueError, match="thread 1"):
        cpu._each(fails)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_turn_during_which_another_process_had_the_core_is_not_quiet(
    cpu: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "TURN_SECONDS", 0.3)
    hog = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", hog, str(cpu.cores[1])])
    try:
        deadline = time.monotonic() + 30
        while psutil.Process(process.pid).cpu_times().user < 0.1 and time.monotonic() < deadline:
            time.sleep(0.05)
        turn = cpu.read(SMALL)
    finally:
        process.kill()
        process.wait()
    assert not turn.quiet
    assert turn.share < 0.9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_products_are_counted_as_two_operations_per_weight_and_row(
    cpu: Cpu, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    assert cpu.multiply(dtype, 64) == 2 * 64**3 / 0.5


def test_integers_are_multiplied_exactly() -> None:
    left, right = pair_of("int8", 64, "cpu")
    assert left.dtype == right.dtype == torch.int8
    assert torch.equal(product("int8")(left, right).long(), left.long() @ right.long())


def test_the_largest_working_set_takes_a_quarter_of_the_free_memory_at_most() -> None:
    assert within((1, 2, 4, 8), 16) == (1, 2, 4)
    assert within((4, 8), 1) == (4,)  # the smallest always


@pytest.mark.parametrize(("limit", "expected"), [("max\n", 5000), ("4000\n", 3000), ("9000\n", 5000), ("500\n", 0)])
def test_free_memory_is_the_containers_where_it_has_less(
    monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    files = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": "1000\n"}
    memory = type("Memory", (), {"available": 5000})
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert devices.available_bytes() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test must lack")
def test_a_device_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="cuda:0 cannot be measured: torch finds no CUDA device"):
        Cuda("cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_is_read_and_multiplied_at_plausible_speeds() -> None:
    cuda = Cuda("cuda:0")
    assert 1e10 < cuda.read(max(cuda.working_sets)).rate < 2e13
    assert 1e11 < cuda.multiply("bfloat16", 4096) < 1e16
