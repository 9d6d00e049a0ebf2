"""Can the input keep up with the trainer, and what does it hold in memory? A corpus larger than that, read at random.

    python benchmarks/input.py          # 20 GB of tokens, if half the free disk has room; some ten minutes
    python benchmarks/input.py --gigabytes 0.2 --seconds 5

Writes token files of two groups into `.work/input` (real bytes, no holes; removed in the end), drops them from the page
cache, and streams batches as pre-training does, one group drawn twice as often as the other and documents kept apart:
in this process, then through 1 and more workers. Printed are tokens/s, and the anonymous memory of this process and its
workers at the first batches and at the last: what is mapped from files the system can drop, the rest it cannot.
Then a plain loop trains the `small` model for comparison.

Exits 1 if the best rate is below 20 times the trainer's, or if anonymous memory grew by more than 32 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from hasten.artifacts import Tokens, write_json
from hasten.hardware import cpu_count, cpu_flags
from hasten.model.config import ModelConfig
from hasten.model.decoder import Decoder
from hasten.training.data import PackedTokens
from hasten.training.feed import Feed

SHAPE = {"layers": 8, "hidden_size": 512, "heads": 8, "kv_heads": 4, "feed_forward_size": 1408}  # conf/model/small.yaml
VOCABULARY, BATCH, LENGTH, DOCUMENT = 8192, 16, 256, 600
CHUNK_TOKENS = 2**25
FIRST_BATCHES = 50
LEAST_RATIO, MOST_GROWTH = 20, 32e6


def write_tokens(folder: Path, size: int) -> Tokens:
    """Token files of about `size` bytes: random ids in documents of 300 to 900 tokens, two groups of equal size."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    documents = max(2, size // 2 // DOCUMENT // 2 * 2)
    offsets = np.lib.format.open_memmap(folder / "train.offsets.npy", "w+", np.int64, (documents + 1,))
    offsets[0] = end = 0
    step = CHUNK_TOKENS // DOCUMENT
    with (folder / "train.bin").open("wb") as file:
        for first in range(0, documents, step):
            last = min(first + step, documents)
            lengths = generator.integers(DOCUMENT // 2, DOCUMENT * 3 // 2, last - first)
            offsets[first + 1 : last + 1] = end + lengths.cumsum()
            file.write(generator.integers(0, VOCABULARY, int(lengths.sum()), np.uint16).tobytes())
            end = int(offsets[last])
        file.flush()
        os.fsync(file.fileno())
    half = int(offsets[documents // 2])
    del offsets
    groups = [
        {"source": source, "language": "en", "splits": {"train": {"tokens": tokens}}}
        for source, tokens in (("one", half), ("two", end - half))
    ]
    facts = {"schema": 1, "kind": "tokens", "dtype": "uint16", "languages": ["en"], "vocab_size": VOCABULARY}
    write_json(folder / "manifest.json", {**facts, "groups": groups})
    return Tokens(folder)


def forget(tokens: Tokens) -> None:
    """Drop the files from the page cache, so that what is read comes from the disk."""
    for path in tokens.path.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous_bytes() -> int:
    """Of this process and all it has started: memory that no file backs, shared or not."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += 1024 * int(line.split()[1])
    return total


def streamed(tokens: Tokens, workers: int, seconds: float) -> tuple[float, int, int]:
    """Tokens/s, anonymous bytes at the first batches, and at the last."""
    data = PackedTokens(
        tokens, "train", steps=10**9, batch_size=BATCH, length=LENGTH, seed=workers, mixture={"two": 2.0}
    )
    begun, before = 0.0, 0
    for seen, batch in enumerate(Feed(data, workers), 1):
        if seen == FIRST_BATCHES:
            begun, before = time.perf_counter(), anonymous_bytes()
        elif seen > FIRST_BATCHES and (now := time.perf_counter()) - begun > seconds:
            return (seen - FIRST_BATCHES) * batch["ids"].numel() / (now - begun), before, anonymous_bytes()
    raise AssertionError("the batches do not end")


def trained(tokens: Tokens, seconds: float) -> float:
    """Tokens/s of a plain training loop on batches that lie in memory."""
    torch.set_num_threads(cpu_count())
    data = PackedTokens(tokens, "train", steps=4, batch_size=BATCH, length=LENGTH, seed=0, apart=False)
    batches = [data[index]["ids"] for index in range(len(data))]
    model = Decoder(ModelConfig(**SHAPE, vocab_size=VOCABULARY))
    model.initialise(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    low, begun, step = "avx512_bf16" in cpu_flags(), 0.0, 0
    while True:
        ids = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = model(ids)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step == 0:  # warm
            begun = time.perf_counter()
        elif (now := time.perf_counter()) - begun > seconds:
            return step * ids.numel() / (now - begun)
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.0, help="0: 20, or half the free disk if that is less")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each rate")
    parser.add_argument("--workers", type=int, default=2, help="the most to try")
    arguments = parser.parse_args()
    folder, console = Path(".work/input"), Console()
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    room = 0.5 * shutil.disk_usage(folder.parent).free
    size = int(arguments.gigabytes * 1e9) or int(min(20e9, room))
    if size > 2 * room:
        sys.exit(f"--gigabytes must fit the free disk ({2 * room / 1e9:.1f}), got {arguments.gigabytes}")
    try:
        tokens = write_tokens(folder, size)
        memory = psutil.virtual_memory().total
        table = Table(
            "reads", "tokens/s", "anonymous MB, first", "last",
            title=f"{size / 1e9:.1f} GB of tokens, {memory / 1e9:.0f} GB of memory, batches of {BATCH} x {LENGTH}",
        )  # fmt: skip
        rates, growth = [], 0
        for workers in range(arguments.workers + 1):
            forget(tokens)
            rate, before, after = streamed(tokens, workers, arguments.seconds)
            rates.append(rate)
            growth = max(growth, after - before)
            name = f"{workers} workers" if workers else "the trainer's process"
            table.add_row(name, f"{rate:,.0f}", f"{before / 1e6:.0f}", f"{after / 1e6:.0f}")
        console.print(table)
        own = trained(tokens, arguments.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratio = max(rates) / own
    console.print(f"a plain loop trains the small model on {own:,.0f} tokens/s: the input is {ratio:.0f}x as fast")
    sys.exit(0 if ratio >= LEAST_RATIO and growth <= MOST_GROWTH else 1)


if __name__ == "__main__":
    main()
