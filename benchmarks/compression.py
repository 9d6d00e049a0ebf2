"""How much memory does a method take? Each on a checkpoint of random weights, in a process of its own.

    python benchmarks/compression.py --rows 8                                 # GPT-2's shape, some fifteen minutes
    python benchmarks/compression.py --shape gemma3-270m --methods rtn,gptq

What goes layer by layer should hold no more than the parent's weights, the calibration text's states, the largest layer
that is treated (a block, or the head), both as float32, and what the method works with by its own formula (`WORK`,
`passing`). So printed is the most that the process held beyond what it held when it had made a tiny variant by the same
method, pages of mapped files included (that is what `build_peak_memory_bytes` of a variant counts, too), how much of it
was anonymous memory (looked at every 2 ms), and the first as a multiple of those four together. Seconds are as they
came.

Options of a method follow its name, between colons: `low_rank:allocation=uniform`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines import SHAPES, apart, write_parent
from omegaconf import OmegaConf

from hasten.artifacts import Checkpoint, load_checkpoint
from hasten.compression.base import Calibration, Compressor
from hasten.compression.make import make_variant
from hasten.config import discover
from hasten.model.config import ModelConfig
from hasten.model.cost import Cost
from hasten.model.cost_report import composed
from hasten.model.grid import ROWS
from hasten.peak import STATUS, peak_bytes, reset_peak

ROW = "{:>12} {:>8} {:>8} {:>10} {:>8} {:>8} {:>8} {:>8} {:>11}"
METHODS = (
    "rtn,hqq,fp8,embedding,magnitude,wanda,smoothquant,awq,gptq,sparsegpt,"
    "low_rank:allocation=uniform,mixed:candidates=[4,8]"
)
TINY = ModelConfig(layers=2, hidden_size=128, heads=4, kv_heads=4, feed_forward_size=256, vocab_size=256, context=1024)
PARENTS = {"embedding": "rtn"}
"""Methods that want another parent than floats."""


def matrices(config: ModelConfig, count: float, element_bytes: int = 8) -> float:
    """Bytes of that many matrices (in, in), for the widest input."""
    return count * element_bytes * max(config.hidden_size, config.feed_forward_size) ** 2


def passing(config: ModelConfig, length: int) -> float:
    """What 8 rows are within a block: as wide as the stream, and as the feed-forward part, each three times."""
    return 8 * length * 3 * (config.hidden_size + config.feed_forward_size) * 4


def mixing(config: ModelConfig, method: Any, length: int) -> float:
    """What `mixed` measures with: every matrix's scales by candidate; for two rows of text the states before each block
    and the distributions over the vocabulary, for 64 tokens two more; rows of the head while they are rounded.
    """
    cost = Cost(config)
    scales = len(method.integral) * (cost.block_parameters + cost.head.weights) / method.group_size * 2
    states = 2 * length * (config.layers + 1) * config.hidden_size * 4
    distributions = (2 * (length - 1) + 2 * 64) * config.vocab_size * 4
    return scales + states + distributions + ROWS * config.hidden_size * 4


WORK: dict[str, Callable[[ModelConfig, Any, int], float]] = {
    "smoothquant": lambda config, method, length: matrices(config, 1.5),  # X^T X, and a part of it in float32
    "awq": lambda config, method, length: matrices(config, 1.5),
    "gptq": lambda config, method, length: matrices(config, 3),  # X^T X, a Cholesky factor, its inverse
    "sparsegpt": lambda config, method, length: matrices(config, 3),
    "low_rank": lambda config, method, length: matrices(config, 1.5),  # it solves for a shorter side
    "mixed": mixing,
}


def shape(name: str) -> ModelConfig:
    """Of `benchmarks/engines.py`, or of `conf/model`."""
    found = SHAPES.get(name) or composed([f"model={name}"]).model
    assert isinstance(found, ModelConfig), f"{name} is no decoder's shape"
    return found


def method_of(asked: str) -> Compressor:
    """`low_rank:allocation=uniform`: a method with its options."""
    name, *options = asked.split(":")
    method = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(discover("compression")[name]), OmegaConf.from_dotlist(options))
    )
    assert isinstance(method, Compressor)
    return method


class Anonymous(threading.Thread):
    """The most anonymous memory that this process holds while it runs, `bytes`; looked at every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.bytes = self.now()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, self.now())

    @staticmethod
    def now() -> int:
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if "RssAnon" in line)


def measured(asked: str, parent_name: str, folder: Path, rows: int, length: int) -> tuple[int, int, float]:
    """In a fresh process: the bytes that making a variant took, how many of them anonymous, and the seconds."""
    import torch

    method = method_of(asked)

    def make(place: Path, rows: int) -> None:
        parent = load_checkpoint(place / parent_name)
        ids = torch.randint(3, parent.config["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
        text = Calibration(ids, torch.zeros_like(ids).int(), torch.ones_like(ids).float())
        needed = None if method.needs == "nothing" else text
        make_variant(method, parent, needed, name=method.name, target=place / method.name, seed=0)

    make(folder / "tiny", 1)
    if not reset_peak():
        raise SystemExit("this system does not let a process reset its peak memory")
    watch, start = Anonymous(), time.perf_counter()
    before, anonymous = peak_bytes()[0], watch.bytes
    watch.start()
    make(folder, rows)
    watch.ended.set()
    peak = peak_bytes()[0]
    assert before and peak
    return peak - before, watch.bytes - anonymous, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="gpt2", help=f"of conf/model, or {', '.join(SHAPES)}")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rows", type=int, default=32, help="of calibration text")
    parser.add_argument("--length", type=int, default=128, help="of a row, in tokens")
    options = parser.parse_args()
    config = shape(options.shape)
    print(ROW.format("method", "seconds", "peak MB", "anonymous", "parent", "layer", "states", "work", "peak / sum"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(write_parent, config, folder)
        apart(write_parent, TINY, folder / "tiny")
        for asked in split(options.methods):
            method = method_of(asked)
            parent = PARENTS.get(method.name, "parent")
            if not (folder / parent).is_dir():
                apart(measured, parent, "parent", folder, options.rows, options.length)
            *held, seconds = apart(measured, asked, parent, folder, options.rows, options.length)
            looks = method.needs != "nothing"
            states = 4 * options.rows * options.length * config.hidden_size if looks else 0
            work = WORK.get(method.name, lambda *_: 0.0)(config, method, options.length)
            work += passing(config, options.length) if looks else 0
            parts = (Checkpoint(folder / parent).weight_bytes, largest_layer(config, method), states, work)
            megabytes = [f"{value / 1e6:,.0f}" for value in (*held, *parts)]
            print(ROW.format(method.name, f"{seconds:.0f}", *megabytes, f"{held[0] / sum(parts):.2f}"), flush=True)
    return 0


def split(methods: str) -> list[str]:
    """At commas that are not within brackets."""
    return re.split(r",(?![^\[]*\])", methods)


def largest_layer(config: ModelConfig, method: Compressor) -> int:
    """Bytes of a block's matrices, or of the head's or embedding's if that is treated and larger; float32."""
    cost, head = Cost(config), method.name == "embedding" or getattr(method, "head", False)
    return 4 * max(cost.block_parameters // config.layers, cost.head.weights if head else 0)


if __name__ == "__main__":
    sys.exit(main())
