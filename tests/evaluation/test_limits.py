from pathlib import Path

import psutil
import pytest

from hasten.errors import UserError
from hasten.evaluation.limits import GIB, Limits, machine_memory_bytes, oom_kills

NUMBERS = {"memory.max": 3 * GIB, "memory.limit_in_bytes": 2 * GIB}


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_the_default_memory_limit_is_nine_tenths_of_the_machine():
    assert Limits(60.0).memory == int(0.9 * machine_memory_bytes())
    assert Limits.of(60.0, 0) == Limits(60.0, None)
    assert Limits.of(60.0, 1.5) == Limits(60.0, 3 * GIB // 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Limits(0), "timeout_seconds must be above 0, got 0"),
        (lambda: Limits(float("nan")), "timeout_seconds must be above 0, got nan"),
        (lambda: Limits(1.0, 0), "memory_bytes must be above 0, got 0"),
        (lambda: Limits.of(1.0, -1), r"memory_limit_gib must be 0 \(nine tenths of the machine's\) or more, got -1"),
    ],
)
def test_impossible_limits_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_limit_is_called_by_its_option():
    assert Limits(1.0, GIB // 2).memory_sentence == "memory_limit_gib (0.5 GiB)"
    assert Limits(1.0).memory_sentence.endswith("GiB, nine tenths of this machine's memory)")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/user/app", {"user/app/memory.max": 3 * GIB}, 3 * GIB),
        ("0::/user/app", {"user/memory.max": 2 * GIB, "user/app/memory.max": "max"}, 2 * GIB),
        ("0::/not/visible/in/a/container", {"memory.max": GIB}, GIB),
        ("4:memory:/box\n0::/", {"memory/box/memory.limit_in_bytes": GIB, "memory/memory.limit_in_bytes": 2**63}, GIB),
        ("3:cpu,memory:/box", {"memory/memory.limit_in_bytes": GIB}, GIB),
        ("0::/", {}, None),
        ("0::/", {"memory.max": "max"}, None),
    ],
)
def test_a_container_s_memory_counts_where_it_is_less(tmp_path, groups, files, expected):
    write(tmp_path / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, text)
    assert machine_memory_bytes(tmp_path) == (expected or psutil.virtual_memory().total)


def test_without_control_groups_it_is_the_machine_s(tmp_path):
    assert machine_memory_bytes(tmp_path) == psutil.virtual_memory().total


def test_the_kernel_s_count_of_kills_is_read(tmp_path):
    assert oom_kills(tmp_path) is None
    write(tmp_path / "proc/vmstat", "nr_free_pages 7\noom_kill 3\nother 4")
    assert oom_kills(tmp_path) == 3
