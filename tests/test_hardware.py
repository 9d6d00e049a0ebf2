from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hasten import hardware


def test_the_machine_is_the_same_every_time_and_says_nothing_measured() -> None:
    first, second = hardware.machine(), hardware.machine()
    assert first == second == json.loads(json.dumps(first))
    assert set(first) == {"id", "system", "architecture", "cpu", "cpu_flags", "cores", "memory_gib", "gpu"}
    assert len(first["id"]) == 12
    assert first["memory_gib"] > 0
    assert first["cpu"]


@pytest.mark.parametrize(
    ("function", "value"), [("cpu_name", "Another CPU"), ("cpu_count", 97), ("gpu_names", ["Another GPU"])]
)
def test_another_machine_has_another_id(monkeypatch: pytest.MonkeyPatch, function: str, value: object) -> None:
    here = hardware.machine()["id"]
    monkeypatch.setattr(hardware, function, lambda: value)
    assert hardware.machine()["id"] != here


def with_quota(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """A container whose cpu.max says so, on a machine that lends 8 cores."""
    real_exists, real_read = Path.exists, Path.read_text
    quota = "/sys/fs/cgroup/cpu.max"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "exists", lambda p: text is not None if str(p) == quota else real_exists(p))
    monkeypatch.setattr(Path, "read_text", lambda p, *a, **k: text if str(p) == quota else real_read(p, *a, **k))


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        (None, 8),
        ("max 100000\n", 8),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("9900000 100000\n", 8),
    ],
)
def test_cores_are_those_of_the_affinity_and_the_containers_quota(
    monkeypatch: pytest.MonkeyPatch, text: str | None, cores: int
) -> None:
    with_quota(monkeypatch, text)
    assert hardware.cpu_count() == cores


def test_vector_extensions_are_listed_without_the_other_flags() -> None:
    flags = hardware.cpu_flags()
    assert flags == sorted(set(flags))
    assert all(flag.startswith(("avx", "fma", "f16c", "amx")) for flag in flags)


def test_a_library_that_is_not_installed_is_null_not_missing() -> None:
    versions = hardware.libraries(("torch", "no-such-distribution-here"))
    assert versions["no-such-distribution-here"] is None
    assert str(versions["torch"])[0].isdigit()


def siblings(tmp_path: Path, pairs: dict[int, str]) -> Path:
    for core, text in pairs.items():
        path = tmp_path / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{text}\n")
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not confine processes to cores")
@pytest.mark.parametrize(
    ("count", "allowed", "expected"),
    [
        (1, range(4), [0]),
        (2, range(4), [0, 2]),
        (3, range(4), [0, 1, 2]),
        (9, range(4), [0, 1, 2, 3]),
        (2, [1, 3], [1, 3]),
    ],
)
def test_threads_get_a_physical_core_each_while_there_are_any(
    tmp_path: Path, count: int, allowed: Sequence[int], expected: list[int]
) -> None:
    pairs = siblings(tmp_path, {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"})
    assert hardware.cores(count, allowed, pairs) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not confine processes to cores")
def test_cores_of_unknown_kind_count_as_physical(tmp_path: Path) -> None:
    assert hardware.cores(2, [5, 1, 3], tmp_path) == [1, 3]
    assert set(hardware.cores(1000)) == os.sched_getaffinity(0)


def test_where_nothing_can_be_confined_nothing_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert hardware.cores(2) is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_memory_that_was_freed_is_used_again() -> None:
    """In a process of its own: what it says to the allocator stays said."""
    program = """
import resource, torch
from hasten.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    assert after < before / 20
