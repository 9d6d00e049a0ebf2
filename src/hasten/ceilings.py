"""This machine's roofs: how many bytes it reads and how many multiplications it makes per second, measured.

A model cannot decode faster than its weights can be read, nor prefill faster than its matrices can be
multiplied (the roofline, Williams et al. 2009). Datasheets promise what a program never sees, so both
are measured, as STREAM does (McCalpin 1995): the best of many short turns, since whatever disturbs a
turn only makes it slower.

How is in `hasten.devices`; `benchmarks/bandwidth.py` compares it with a C program.

The result belongs to a machine, not to a plan: it is kept in `.work/ceilings/` and never a dependency
of a stage, for it differs a little every time it is measured.

    python pipelines/ceilings.py again=true
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from hasten.artifacts import SCHEMA, Json, read_json, write_json
from hasten.devices import Cpu, Cuda, Device, Turn
from hasten.hardware import THREAD_VARIABLES, libraries, machine

FOLDER = Path(".work", "ceilings")
DTYPES = ("float32", "bfloat16", "float16", "int8")
PRODUCT_SECONDS = 0.25
"""The largest matrices whose product takes less than this are multiplied: where there is no kernel, small ones."""
ATTEMPTS = 3
"""A record that is noisy is measured again when it is asked for, until it was measured that often."""
ROUNDS = 12
QUIET_TURNS = 4
"""How many quiet turns every working set needs; more rounds follow until it has them."""
BUDGET_SECONDS = 20.0
USABLE_SHARE = 0.1
"""A number format multiplied slower than this share of float32 has no kernel worth the name."""
SETTLE_SECONDS = 0.02
"""After a product its threads still spin for a while, in the way of what comes next."""
TIMEOUT_SECONDS = 180.0


def ceilings(
    threads: int,
    device: str = "cpu",
    *,
    cores: Sequence[int] | None = None,
    folder: Path = FOLDER,
    again: bool = False,
) -> Json:
    """The ceilings of this machine for that many threads; measured (half a minute) if they are not known yet.

    device: `cpu` or `cuda:0`. cores: which cores the threads are confined to, by default the first ones allowed.
    again: measure once more and keep the faster of each; on a shared machine the first time may have been a slow one.
    Measured in a process of its own, one at a time per machine.

    `read_bytes_per_second` is a list of {working_set_bytes, bytes_per_second, median_bytes_per_second, turns,
    quiet_turns}; `cache_bytes_per_second` is the fastest of them, `dram_bytes_per_second` that of the largest
    working set. `matmul_flops_per_second` is by number format, null (and `why`) where there is no kernel for it.
    `validity` is `noisy` if other processes held the cores while it was measured, and `valid` otherwise.
    Raises `RuntimeError` with one sentence if it cannot be measured.
    """
    from filelock import FileLock

    identity = machine()["id"]
    path = record_path(identity, threads, device, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = _record(path)
        if not again and is_final(known):
            return known
        found = {"schema": SCHEMA, "machine": identity, "attempts": 1, **in_a_process(threads, device, cores)}
        if known and known["versions"] == found["versions"]:
            found = faster(known, found)
        write_json(path, found)
        return found


def record_path(identity: str, threads: int, device: str = "cpu", folder: Path = FOLDER) -> Path:
    """Where the ceilings of a machine (its `id`) are kept, whether they are known yet or not."""
    kind = str(threads) if device == "cpu" else device.replace(":", "")
    return folder / f"{identity}-{kind}.json"


def _record(path: Path) -> Json:
    """What is written there; empty if there is nothing that this version reads."""
    known = read_json(path) if path.is_file() else {}
    return known if known.get("schema") == SCHEMA else {}


def is_final(record: Json) -> bool:
    """Whether nothing is measured any more unless it is asked for again: it was valid, or noisy often enough."""
    return bool(record) and (record["validity"] == "valid" or record["attempts"] >= ATTEMPTS)


def are_known(threads: int, device: str = "cpu", folder: Path = FOLDER) -> bool:
    """Whether `ceilings` answers at once, without measuring."""
    return is_final(_record(record_path(machine()["id"], threads, device, folder)))


def faster(old: Json, new: Json) -> Json:
    """The newer record with the faster of both for every ceiling."""
    before = {entry["working_set_bytes"]: entry["bytes_per_second"] for entry in old["read_bytes_per_second"]}
    entries = [
        {**entry, "bytes_per_second": max(entry["bytes_per_second"], before.get(entry["working_set_bytes"], 0.0))}
        for entry in new["read_bytes_per_second"]
    ]
    rates = {
        dtype: None if rate is None else max(rate, old["matmul_flops_per_second"].get(dtype) or 0.0)
        for dtype, rate in new["matmul_flops_per_second"].items()
    }
    validity = "valid" if "valid" in (old["validity"], new["validity"]) else "noisy"
    summed = {"attempts": old["attempts"] + new["attempts"], "validity": validity}
    return {**new, **summed, **_reading(entries), "matmul_flops_per_second": rates}


def _reading(entries: list[Json]) -> Json:
    return {
        "read_bytes_per_second": entries,
        "cache_bytes_per_second": max(entry["bytes_per_second"] for entry in entries),
        "dram_bytes_per_second": entries[-1]["bytes_per_second"],
    }


def in_a_process(threads: int, device: str, cores: Sequence[int] | None) -> Json:
    """`measure` in a fresh process with the environment that every trial gets."""
    environment = {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    job = {"threads": threads, "device": device, "cores": None if cores is None else list(cores)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "hasten.ceilings"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"measuring the ceilings took more than {TIMEOUT_SECONDS:g} s") from None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        last = said[-1] if said else f"its process ended with {done.returncode}"
        raise RuntimeError(f"the ceilings could not be measured: {last.removeprefix('RuntimeError: ')}")
    found: Json = json.loads(lines[-1])
    return found


def main() -> None:
    job = json.load(sys.stdin)
    sys.stdout.write(json.dumps(measure(job["threads"], job["device"], job["cores"])) + "\n")


def measure(threads: int, device: str = "cpu", cores: Sequence[int] | None = None) -> Json:
    """The ceilings, measured in this process, which is confined to its cores."""
    begun = time.monotonic()
    bench: Device = Cpu(threads, cores) if device == "cpu" else Cuda(device)
    products = {dtype: Product(bench, dtype) for dtype in DTYPES}
    reads: dict[int, list[Turn]] = {size: [] for size in bench.working_sets}
    deadline, rounds = time.monotonic() + BUDGET_SECONDS, 0
    while rounds < ROUNDS or (not _settled(reads) and time.monotonic() < deadline):
        for each in products.values():
            each.turn()
        time.sleep(SETTLE_SECONDS)
        for size, turns in reads.items():
            turns.append(bench.read(size))
        rounds += 1
    entries = [{"working_set_bytes": size, **_entry(turns)} for size, turns in reads.items()]
    missing = {dtype: each.missing(products["float32"].rate) for dtype, each in products.items()}
    return {
        "device": device,
        "threads": threads,
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - begun, 1),
        "rounds": rounds,
        "versions": libraries(("torch",)),
        "validity": "valid" if _settled(reads) else "noisy",
        **_reading(entries),
        "matmul_flops_per_second": {
            dtype: each.rate if missing[dtype] is None else None for dtype, each in products.items()
        },
        "why": {f"matmul_flops_per_second.{dtype}": why for dtype, why in missing.items() if why},
    }


def _settled(reads: dict[int, list[Turn]]) -> bool:
    return all(sum(turn.quiet for turn in turns) >= QUIET_TURNS for turns in reads.values())


def _entry(turns: list[Turn]) -> Json:
    """The best turn: a disturbed one can only be slower, so there is no need to leave any out."""
    return {
        "bytes_per_second": max(turn.rate for turn in turns),
        "median_bytes_per_second": statistics.median(turn.rate for turn in turns),
        "turns": len(turns),
        "quiet_turns": sum(turn.quiet for turn in turns),
    }


class Product:
    """The best rate at which a device multiplies matrices of one number format."""

    def __init__(self, bench: Device, dtype: str) -> None:
        self.bench, self.dtype, self.rate = bench, dtype, 0.0
        self.error: str | None = None
        self.kernel = "torch._int_mm" if dtype == "int8" else "torch.mm"
        for _ in range(3):
            self.turn()

    @property
    def size(self) -> int:
        """Of the matrices to multiply next: as large as time allows, going by the best rate so far."""
        fitting = [n for n in self.bench.matrices if 2 * n**3 <= PRODUCT_SECONDS * self.rate]
        return max(fitting, default=min(self.bench.matrices))

    def turn(self) -> None:
        if self.error is None:
            try:
                self.rate = max(self.rate, self.bench.multiply(self.dtype, self.size))
            except (RuntimeError, TypeError) as error:
                self.error = " ".join(str(error).split())[:200]

    def missing(self, float32: float) -> str | None:
        """Why there is no ceiling, or None if there is one."""
        if self.error is not None:
            return f"{self.kernel} does not multiply {self.dtype} here: {self.error}"
        if self.rate >= USABLE_SHARE * float32:
            return None
        return (
            f"{self.kernel} multiplies {self.dtype} at {self.rate / 1e9:.2g} GFLOP/s, "
            f"{100 * self.rate / float32:.2g}% of float32: it has no vector kernel for it on this processor"
        )


def read_rate(found: Json, working_set_bytes: float) -> float:
    """Bytes per second at a working set, on straight lines between the measured ones (both axes logarithmic)."""
    points = [(entry["working_set_bytes"], entry["bytes_per_second"]) for entry in found["read_bytes_per_second"]]
    if working_set_bytes <= points[0][0]:
        return float(points[0][1])
    for (left, low), (right, high) in pairwise(points):
        if working_set_bytes <= right:
            part = math.log(working_set_bytes / left) / math.log(right / left)
            return float(low * (high / low) ** part)
    return float(points[-1][1])


if __name__ == "__main__":
    main()
