"""How much memory does a method take? Each on a checkpoint of random weights, in a process of its own.

    python benchmarks/compression.py                                          # GPT-2's shape, some ten minutes
    python benchmarks/compression.py --shape gemma3-270m --methods rtn,gptq

What goes layer by layer should hold no more than the parent's weights, the calibration text's states and what it
computes with one layer. So printed is the most that the process held beyond what it held with torch loaded, and how
that compares with the parent's bytes, those of the states, and those of the largest layer that is treated (a block or
the head) as float32. Seconds are as they came.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from engines import SHAPES, apart, write_parent

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration
from hasten.compression.make import make_variant
from hasten.compression.shared.quantiser import Quantiser
from hasten.config import discover
from hasten.evaluation.memory import peak_bytes, reset_peak
from hasten.model.config import ModelConfig
from hasten.model.cost import Cost
from hasten.model.cost_report import composed

ROW = "{:>12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>11}"
METHODS = "rtn,hqq,gptq,awq,smoothquant,magnitude,wanda,sparsegpt"


def shape(name: str) -> ModelConfig:
    """Of `benchmarks/engines.py`, or of `conf/model`."""
    found = SHAPES.get(name) or composed([f"model={name}"]).model
    assert isinstance(found, ModelConfig), f"{name} is no decoder's shape"
    return found


def measured(name: str, folder: Path, rows: int, length: int) -> tuple[int, float]:
    """In a fresh process: the bytes that making a variant took, and the seconds."""
    import torch

    import hasten.model.huggingface  # noqa: F401

    parent, method = Checkpoint(folder / "parent"), discover("compression")[name]()
    ids = torch.randint(3, parent.config["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))
    text = Calibration(ids, torch.zeros_like(ids).int(), torch.ones_like(ids).float())
    torch.linalg.cholesky(torch.eye(64, dtype=torch.float64) @ torch.eye(64, dtype=torch.float64))
    if not reset_peak():
        raise SystemExit("this system does not let a process reset its peak memory")
    before, start = peak_bytes()[0], time.perf_counter()
    needed = None if method.needs == "nothing" else text
    make_variant(method, parent, needed, name=name, target=folder / name, seed=0)
    peak = peak_bytes()[0]
    assert before and peak
    return peak - before, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="gpt2", help=f"of conf/model, or {', '.join(SHAPES)}")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rows", type=int, default=32, help="of calibration text")
    parser.add_argument("--length", type=int, default=128, help="of a row, in tokens")
    options = parser.parse_args()
    config = shape(options.shape)
    states = 4 * options.rows * options.length * config.hidden_size
    print(ROW.format("method", "seconds", "peak MB", "parent", "layer", "states", "peak / sum"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(write_parent, config, folder)
        parent = Checkpoint(folder / "parent").weight_bytes
        for method in options.methods.split(","):
            peak, seconds = apart(measured, method, folder, options.rows, options.length)
            layer = largest_layer(config, head=issubclass(discover("compression")[method], Quantiser))
            ratio = peak / (parent + layer + states)
            megabytes = [f"{value / 1e6:,.0f}" for value in (peak, parent, layer, states)]
            print(ROW.format(method, f"{seconds:.0f}", *megabytes, f"{ratio:.2f}"), flush=True)
    return 0


def largest_layer(config: ModelConfig, *, head: bool) -> int:
    """Bytes of a block's matrices, or of the head's if that is treated and larger; float32."""
    cost = Cost(config)
    return 4 * max(cost.block_parameters // config.layers, cost.head.weights if head else 0)


if __name__ == "__main__":
    sys.exit(main())
