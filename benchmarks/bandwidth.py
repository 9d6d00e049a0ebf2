"""Is the bandwidth that `hasten.ceilings` reports real? Side by side with a C program, and with llama.cpp.

    python benchmarks/bandwidth.py          # two to six minutes on two cores; needs a C compiler (`cc`)

The machine's speed moves from second to second, so everything takes short turns: per round, ours and the C program's
reading there and back, at every working set. Printed are the best of all turns (what a ceiling is) and the median and
quartiles of the rounds' ratios. Then llama.cpp decodes with a random F32 model of 110M parameters, larger than the
cache, in turns with our reading of as many bytes: its MBU. Rounds in which other processes took a core do not count.

Exits 1 if ours is off by more than 10% (the median of the ratios) from 4 MiB up, if the MBU is not 80 to 110%, or if
the machine was too busy to tell.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hasten.artifacts import Variant
from hasten.devices import TURN_SECONDS, Cpu, Turn
from hasten.engine.base import Dtype, Request
from hasten.engine.llamacpp import Llamacpp
from hasten.evaluation.roofline import Work, decoding
from hasten.hardware import cpu_count
from hasten.model.config import ModelConfig
from hasten.scenario.timing import timed

ROUNDS, FEWEST_ROUNDS, BUDGET_SECONDS = 20, 8, 180.0
TOLERANCE, JUDGED_FROM = 0.1, 4 * 2**20
SHAPE = {"layers": 12, "hidden_size": 768, "heads": 12, "kv_heads": 12, "feed_forward_size": 2048, "vocab_size": 32000}
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 64
LOWEST_MBU, HIGHEST_MBU = 0.8, 1.1
SETTLE_SECONDS = 0.05  # threads that spin when their work is done must not be in the way of the next turn


class Stream:
    """The C program, compiled, running and waiting for its turns."""

    def __init__(self, folder: Path, threads: int, largest: int) -> None:
        program, source = folder / "stream", Path(__file__).with_name("stream.c")
        command = ["cc", "-O3", "-march=native", "-pthread", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        self.process = subprocess.Popen(
            [str(program), str(threads), str(largest)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, working_set: int) -> Turn:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{working_set} {TURN_SECONDS}\n")
        self.process.stdin.flush()
        rate, share, _ = self.process.stdout.readline().split()
        return Turn(float(rate), float(share))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def against_c(console: Console, bench: Cpu, folder: Path, threads: int) -> bool:
    """Print the table; whether every ratio that counts is within the tolerance."""
    stream = Stream(folder, threads, max(bench.working_sets))
    ours: dict[int, list[float]] = {size: [] for size in bench.working_sets}
    theirs: dict[int, list[float]] = {size: [] for size in bench.working_sets}
    ratios: dict[int, list[float]] = {size: [] for size in bench.working_sets}
    deadline = time.monotonic() + BUDGET_SECONDS
    while time.monotonic() < deadline and min(map(len, ratios.values())) < ROUNDS:
        for size in bench.working_sets:
            turns = [bench.read(size), stream.read(size), stream.read(size), bench.read(size)]
            if len(ratios[size]) == ROUNDS or not all(turn.quiet for turn in turns):
                continue
            rates = [turn.rate for turn in turns]
            ours[size] += [rates[0], rates[3]]
            theirs[size] += rates[1:3]
            ratios[size].append(math.sqrt(rates[0] * rates[3] / (rates[1] * rates[2])))
    stream.close()
    title = f"GB/s read by {threads} threads in turns of {1000 * TURN_SECONDS:g} ms"
    names = ("MiB", "ours, best", "C, best", "best/best", "in turns [quartiles]", "quiet rounds")
    table, good = Table(*names, title=title), True
    for size in bench.working_sets:
        if len(ratios[size]) < FEWEST_ROUNDS:
            table.add_row(f"{size / 2**20:g}", "", "", "", "the machine was too busy", f"{len(ratios[size])}")
            good = False
            continue
        low, middle, high = quartiles(ratios[size])
        best = max(ours[size]) / max(theirs[size])
        bad = size >= JUDGED_FROM and abs(middle - 1) > TOLERANCE
        good = good and not bad
        rates = [f"{max(values[size]) / 1e9:.1f}" for values in (ours, theirs)]
        spread = f"{middle:.3f} [{low:.3f}, {high:.3f}]{' OFF' if bad else ''}"
        table.add_row(f"{size / 2**20:g}", *rates, f"{best:.2f}", spread, f"{len(ratios[size])}")
    console.print(table)
    return good


def random_variant(folder: Path) -> Variant:
    """A variant of 110M parameters, 438 MB in float32."""
    import torch

    from hasten.model.config_json import to_huggingface
    from hasten.model.decoder import Decoder
    from hasten.model.huggingface import network_tensors, save_checkpoint

    config = ModelConfig(**SHAPE)
    model = Decoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.02)
    manifest = {"kind": "variant", "name": "random", "lineage": ["random"], "grid": None}
    save_checkpoint(
        folder / "random",
        to_huggingface(config, bos_id=0, eos_id=1, pad_id=2),
        network_tensors(model),
        folder,
        manifest,
    )
    return Variant(folder / "random")


def llamacpp_mbu(console: Console, bench: Cpu, folder: Path, threads: int) -> bool:
    """Print the MBU of decoding in turns with reading; whether it is possible and near enough to the ceiling."""
    session = Llamacpp(threads=threads, weight_dtype=Dtype.float32, max_context=256).load(
        random_variant(folder), folder
    )
    work = Work(ModelConfig(**SHAPE), session.weight_bytes_per_token, session.kv_bytes_per_position, session.arithmetic)
    request = Request(0, tuple(range(100, 100 + PROMPT_TOKENS)), OUTPUT_TOKENS)
    size = work.weight_bytes_per_token + work.kv_bytes_per_position * (PROMPT_TOKENS + OUTPUT_TOKENS // 2)

    def mbu(rate: float, seconds: float) -> float:
        points = [{"working_set_bytes": size, "bytes_per_second": rate}]
        ceilings = {"read_bytes_per_second": points, "matmul_flops_per_second": {}, "why": {}}
        return float(decoding(work, PROMPT_TOKENS, OUTPUT_TOKENS, seconds, ceilings)["mbu"])

    rates: list[float] = []
    seconds: list[float] = []
    shares: list[float] = []
    timed(session, request)  # to warm up
    deadline = time.monotonic() + BUDGET_SECONDS
    while time.monotonic() < deadline and len(shares) < ROUNDS:
        time.sleep(SETTLE_SECONDS)
        before = bench.read(size)
        start, own = time.perf_counter(), time.process_time()
        tpot = timed(session, request).tpot_seconds
        # Its threads spin while they wait for each other, so undisturbed they have all of their cores.
        decode = Turn(0.0, (time.process_time() - own) / (time.perf_counter() - start) / threads)
        time.sleep(SETTLE_SECONDS)
        after = bench.read(size)
        if all(turn.quiet for turn in (before, decode, after)):
            rates += [before.rate, after.rate]
            seconds.append(tpot)
            shares.append(mbu(2 / (1 / before.rate + 1 / after.rate), tpot))
    session.close()
    if len(shares) < FEWEST_ROUNDS:
        console.print(f"llama.cpp: the machine was too busy, {len(shares)} quiet rounds")
        return False
    low, middle, high = quartiles(shares)
    console.print(
        f"llama.cpp {session.kernel}, {size / 1e6:.0f} MB per token: {1 / statistics.median(seconds):.1f} tokens/s "
        f"(best {1 / min(seconds):.1f}), reads {size / statistics.median(seconds) / 1e9:.1f} GB/s "
        f"(best {size / min(seconds) / 1e9:.1f}) where we read {statistics.median(rates) / 1e9:.1f} "
        f"(best {max(rates) / 1e9:.1f})\n"
        f"MBU in turns {middle:.0%} [quartiles {low:.0%}, {high:.0%}] over {len(shares)} quiet rounds; "
        f"best against best {mbu(max(rates), min(seconds)):.0%}",
        soft_wrap=True,
        markup=False,  # brackets are meant
    )
    return LOWEST_MBU <= middle <= HIGHEST_MBU


def main() -> int:
    console, threads = Console(highlight=False, width=100), cpu_count()
    bench = Cpu(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = against_c(console, bench, folder, threads)
        good = llamacpp_mbu(console, bench, folder, threads) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
