from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hasten import ceilings as module
from hasten.artifacts import Json
from hasten.ceilings import DTYPES, Product, are_known, ceilings, faster, measure, read_rate
from hasten.devices import Turn

ROOT = Path(__file__).parents[1]
CLEAR, DISTURBED = 1.0, 0.5


def record(read: float = 1e10, multiply: float | None = 1e11, **more: Any) -> Json:
    """What `measure` returns, small."""
    return {
        "device": "cpu", "threads": 2, "cores": [0, 1], "date": "2026-11-23", "versions": {"torch": "2"},
        "read_bytes_per_second": [
            {"working_set_bytes": 2**20, "bytes_per_second": 10 * read},
            {"working_set_bytes": 2**30, "bytes_per_second": read},
        ],
        "cache_bytes_per_second": 10 * read, "dram_bytes_per_second": read,
        "matmul_flops_per_second": {"float32": multiply, "float16": None}, "validity": "valid", "why": {}, **more,
    }  # fmt: skip


class Bench:
    """A device with given speeds. shares: what the threads had of their cores, turn after turn (then all of it)."""

    working_sets: tuple[int, ...] = (1024, 2048)
    matrices: tuple[int, ...] = (16, 32, 64)

    def __init__(self, shares: list[float] | None = None, **rates: float | Exception) -> None:
        self.shares, self.rates = list(shares or []), {**dict.fromkeys(DTYPES, 1e9), **rates}
        self.reads: list[int] = []
        self.sizes: list[int] = []

    def read(self, working_set: int) -> Turn:
        self.reads.append(working_set)
        return Turn(1e12 / working_set + len(self.reads), self.shares.pop(0) if self.shares else CLEAR)

    def multiply(self, dtype: str, size: int) -> float:
        self.sizes.append(size)
        rate = self.rates[dtype]
        if isinstance(rate, Exception):
            raise rate
        return rate


def measured(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> Json:
    monkeypatch.setattr(module, "Cpu", lambda threads, cores: bench)
    monkeypatch.setattr(module, "SETTLE_SECONDS", 0.0)
    found = measure(2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Json]:
    """What the next processes find; taken from the front."""
    queue: list[Json] = []
    monkeypatch.setattr(module, "in_a_process", lambda threads, device, cores: queue.pop(0))
    return queue


def test_the_best_of_all_turns_counts_and_the_median_is_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, Bench())
    small, large = found["read_bytes_per_second"]
    assert found["rounds"] == small["turns"] == small["quiet_turns"] == module.ROUNDS
    assert small["working_set_bytes"] == 1024
    assert small["bytes_per_second"] == 1e12 / 1024 + 2 * module.ROUNDS - 1
    assert small["median_bytes_per_second"] == 1e12 / 1024 + module.ROUNDS
    assert found["cache_bytes_per_second"] == small["bytes_per_second"]
    assert found["dram_bytes_per_second"] == large["bytes_per_second"]
    assert found["validity"] == "valid"
    assert found["matmul_flops_per_second"] == dict.fromkeys(DTYPES, 1e9)
    assert found["why"] == {}


def test_rounds_go_on_until_every_working_set_had_its_quiet_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([DISTURBED] * 2 * module.ROUNDS)
    found = measured(monkeypatch, bench)
    assert found["rounds"] == module.ROUNDS + module.QUIET_TURNS
    assert found["validity"] == "valid"


def test_a_machine_that_was_never_quiet_is_labelled_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET_SECONDS", 0.0)
    found = measured(monkeypatch, Bench([DISTURBED] * 10000))
    assert (found["validity"], found["rounds"]) == ("noisy", module.ROUNDS)


def test_a_format_without_a_kernel_is_null_with_the_kernel_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(float16=2e7, int8=RuntimeError("not implemented\nfor Char"))
    found = measured(monkeypatch, bench)
    assert found["matmul_flops_per_second"] == {"float32": 1e9, "bfloat16": 1e9, "float16": None, "int8": None}
    assert found["why"] == {
        "matmul_flops_per_second.float16": "torch.mm multiplies float16 at 0.02 GFLOP/s, 2% of float32: it has no "
        "vector kernel for it on this processor",
        "matmul_flops_per_second.int8": "torch._int_mm does not multiply int8 here: not implemented for Char",
    }


def test_matrices_are_as_large_as_the_speed_allows_and_never_cost_minutes() -> None:
    slow = Bench(float32=2 * 32**3 / module.PRODUCT_SECONDS)
    Product(slow, "float32")
    assert slow.sizes == [16, 32, 32]
    crawling = Bench(float32=1.0)
    Product(crawling, "float32")
    assert crawling.sizes == [16, 16, 16]


def test_what_is_known_is_not_measured_again(tmp_path: Path, children: list[Json]) -> None:
    children.append(record())
    first = ceilings(2, folder=tmp_path)
    assert ceilings(2, folder=tmp_path) == first
    assert first["schema"] == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".lock"]
    assert sorted(tmp_path.iterdir())[0].name == f"{first['machine']}-2.json"


def test_threads_and_devices_have_records_of_their_own(tmp_path: Path, children: list[Json]) -> None:
    children += [record(1e10), record(2e10), record(3e10)]
    made = [ceilings(2, folder=tmp_path), ceilings(4, folder=tmp_path), ceilings(2, "cuda:0", folder=tmp_path)]
    assert [found["dram_bytes_per_second"] for found in made] == [1e10, 2e10, 3e10]


def test_measuring_again_keeps_the_faster_of_each(tmp_path: Path, children: list[Json]) -> None:
    children += [record(1e10, 2e11), record(2e10, 1e11, date="2026-11-24")]
    ceilings(2, folder=tmp_path)
    found = ceilings(2, folder=tmp_path, again=True)
    assert [entry["bytes_per_second"] for entry in found["read_bytes_per_second"]] == [2e11, 2e10]
    assert (found["cache_bytes_per_second"], found["dram_bytes_per_second"]) == (2e11, 2e10)
    assert found["matmul_flops_per_second"] == {"float32": 2e11, "float16": None}
    assert (found["attempts"], found["date"]) == (2, "2026-11-24")
    assert ceilings(2, folder=tmp_path) == found


def test_a_new_torch_starts_a_new_record(tmp_path: Path, children: list[Json]) -> None:
    children += [record(2e10), record(1e10, versions={"torch": "3"})]
    ceilings(2, folder=tmp_path)
    assert ceilings(2, folder=tmp_path, again=True)["dram_bytes_per_second"] == 1e10


def test_a_noisy_record_is_measured_again_until_it_is_valid(tmp_path: Path, children: list[Json]) -> None:
    children += [record(1e10, validity="noisy"), record(2e10), record(9e10)]
    assert not are_known(2, folder=tmp_path)
    assert ceilings(2, folder=tmp_path)["validity"] == "noisy"
    assert not are_known(2, folder=tmp_path)  # it would be measured again
    found = ceilings(2, folder=tmp_path)
    assert (found["validity"], found["dram_bytes_per_second"]) == ("valid", 2e10)
    assert are_known(2, folder=tmp_path)
    assert ceilings(2, folder=tmp_path) == found


def test_a_machine_that_is_never_quiet_is_measured_a_few_times_only(tmp_path: Path, children: list[Json]) -> None:
    children += [record(validity="noisy")] * 9
    for _ in range(6):
        assert ceilings(2, folder=tmp_path)["validity"] == "noisy"
    assert len(children) == 9 - module.ATTEMPTS


def test_a_ceiling_that_only_one_of_two_records_has_is_kept_as_the_newer_says() -> None:
    old, new = record(1e10, attempts=1), record(1e9, None, attempts=1)
    old["read_bytes_per_second"] = old["read_bytes_per_second"][1:]
    found = faster(old, new)
    assert found["matmul_flops_per_second"]["float32"] is None
    assert [entry["bytes_per_second"] for entry in found["read_bytes_per_second"]] == [1e10, 1e10]


def test_another_schema_is_measured_anew(tmp_path: Path, children: list[Json]) -> None:
    children += [record(2e10), record(1e10)]
    found = ceilings(2, folder=tmp_path)
    path = tmp_path / f"{found['machine']}-2.json"
    path.write_text(json.dumps({**found, "schema": 0}))
    assert ceilings(2, folder=tmp_path)["dram_bytes_per_second"] == 1e10


def test_a_process_that_cannot_measure_is_one_sentence(tmp_path: Path) -> None:
    words = r"^the ceilings could not be measured: nowhere:0 cannot be measured: torch finds no CUDA device$"
    with pytest.raises(RuntimeError, match=words):
        ceilings(1, "nowhere:0", folder=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_process_that_takes_too_long_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match=r"took more than 0\.01 s"):
        ceilings(1, folder=tmp_path)


def test_bandwidth_between_two_working_sets_lies_on_a_straight_line_of_logarithms() -> None:
    found = record(1e10)
    assert read_rate(found, 1) == 1e11
    assert read_rate(found, 2**20) == 1e11
    assert read_rate(found, 2**25) == pytest.approx(10**10.5)
    assert read_rate(found, 2**30) == pytest.approx(1e10)
    assert read_rate(found, 2**40) == 1e10


@pytest.mark.slow
def test_this_machine_is_measured_in_half_a_minute_and_its_cache_is_faster_than_its_memory(tmp_path: Path) -> None:
    found = ceilings(2, folder=tmp_path)
    assert found["seconds"] < 40
    assert 1e9 < found["dram_bytes_per_second"] < found["cache_bytes_per_second"] < 1e13
    assert found["matmul_flops_per_second"]["float32"] > 1e9
    assert found["read_bytes_per_second"][0]["working_set_bytes"] == 2**18


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("thread=2", "options are threads=..., device=..., again=..., got 'thread=2'"),
        ("threads=0", "threads must be 1 to 4096, got '0'"),
        ("again=maybe", "again must be true or false, got 'maybe'"),
    ],
)
def test_the_entry_point_refuses_what_it_cannot_do(argument: str, words: str) -> None:
    command = [sys.executable, str(ROOT / "pipelines/ceilings.py"), argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, f"ceilings: {words}\n")
