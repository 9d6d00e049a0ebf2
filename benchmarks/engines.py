"""How fast is every engine, and how far from this machine's limits? Engines x formats on shapes with random weights.

    python benchmarks/engines.py                     # 15M and 110M parameters; some 20 minutes on two cores
    python benchmarks/engines.py --shapes 110m --engines native,llamacpp --rounds 3

Three figures each, in tokens/s: decoding (128 tokens after a prompt of 16, alone), prefill (512 tokens, alone) and
eight users at once (64 tokens each after 16). In a round every case runs in a fresh process, one after the other, the
next round in reverse; a case that was disturbed is repeated. Printed are medians over rounds with the lowest and
highest, what share of the memory bandwidth decoding used (MBU), and of the arithmetic of its number format prefill did
(MFU), against ceilings measured before (`python pipelines/ceilings.py`).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hasten.artifacts import Checkpoint, Variant
from hasten.ceilings import ceilings
from hasten.compression.base import Compressor
from hasten.compression.identity import Identity
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Dtype, Engine, Request, Session
from hasten.engine.eager import Eager
from hasten.engine.llamacpp import Llamacpp
from hasten.engine.native import Native
from hasten.engine.openvino import Openvino
from hasten.engine.transformers import Transformers
from hasten.evaluation.conditions import Watch
from hasten.evaluation.roofline import Work, decoding, prefilling
from hasten.hardware import THREAD_VARIABLES, cores, cpu_count
from hasten.model.config import ModelConfig

PROMPT, DECODED, PREFILLED, USERS, EACH, REPEATS, ATTEMPTS = 16, 128, 512, 8, 64, 3, 3
LARGE: dict[str, int] = {"vocab_size": 32000, "context": 1024}
SHAPES = {
    "15m": ModelConfig(layers=6, hidden_size=288, heads=6, kv_heads=6, feed_forward_size=768, **LARGE),
    "110m": ModelConfig(layers=12, hidden_size=768, heads=12, kv_heads=12, feed_forward_size=2048, **LARGE),
    "1b": ModelConfig(layers=16, hidden_size=2048, heads=32, kv_heads=8, feed_forward_size=8192, **LARGE),
}
METHODS: dict[str, Compressor] = {
    "float": Identity(),
    "int8": Rtn(bits=8, group_size=32),
    "int4": Rtn(bits=4, group_size=32),
}
FORMATS = {"float32": ("float", Dtype.float32), "bfloat16": ("float", Dtype.bfloat16)}  # others: the variant's own
ENGINES: dict[str, type[Engine]] = {
    "eager": Eager,
    "transformers": Transformers,
    "llamacpp": Llamacpp,
    "native": Native,
    "openvino": Openvino,
}
SEQUENTIAL = ("eager", "transformers")


@dataclass(frozen=True)
class Case:
    """An engine on a format. slots: requests at the same time."""

    engine: str
    format: str
    threads: int
    slots: int = 1

    @property
    def variant(self) -> str:
        return FORMATS.get(self.format, (self.format, None))[0]

    def options(self) -> Engine:
        dtype = FORMATS.get(self.format, (None, Dtype.bfloat16))[1]
        options: dict[str, Any] = {} if self.engine in SEQUENTIAL else {"slots": self.slots}
        return ENGINES[self.engine](threads=self.threads, max_context=1024, weight_dtype=dtype, **options)


@dataclass(frozen=True)
class Result:
    """Tokens per second, and what was loaded. together: of all users, NaN for engines that take them one by one."""

    decode: float
    prefill: float
    together: float
    kernel: str
    work: Work


def prompt(length: int, config: ModelConfig) -> tuple[int, ...]:
    import torch

    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(3, config.vocab_size, (length,), generator=generator).tolist())


def made(name: str, folder: Path) -> None:
    """The shape's variants, with random weights, in `folder`."""
    import torch

    from hasten.model.config_json import to_huggingface
    from hasten.model.decoder import Decoder
    from hasten.model.huggingface import network_tensors, save_checkpoint

    model = Decoder(SHAPES[name])
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
    config = to_huggingface(SHAPES[name], bos_id=0, eos_id=1, pad_id=2)
    save_checkpoint(folder / "parent", config, network_tensors(model), folder, {"kind": "checkpoint"})
    for variant, method in METHODS.items():
        make_variant(method, Checkpoint(folder / "parent"), None, name=variant, target=folder / variant, seed=0)


def alone(session: Session, config: ModelConfig) -> tuple[float, float]:
    """Decoding and prefill."""
    decode, prefill = [], []
    list(session.submit(Request(0, prompt(PROMPT, config), 8)))
    for number in range(REPEATS):
        tokens = list(session.submit(Request(number, prompt(PROMPT, config), DECODED)))
        decode.append((DECODED - 1) / (tokens[-1].seconds - tokens[0].seconds))
        (first,) = session.submit(Request(number, prompt(PREFILLED, config), 1))
        prefill.append(PREFILLED / first.seconds)
    return statistics.median(decode), statistics.median(prefill)


def users(session: Session, config: ModelConfig) -> float:
    def once() -> float:
        streams = [session.submit(Request(i, prompt(PROMPT + i % 2, config), EACH)) for i in range(USERS)]
        return USERS * EACH / max(list(stream)[-1].seconds for stream in streams)

    once()
    return statistics.median(once() for _ in range(REPEATS))


def measure(case: Case, shape: str, folder: Path) -> Result | str:
    """In a process of its own: figures, or why there are none."""
    config, variant = SHAPES[shape], Variant(folder / case.variant)
    engine = case.options()
    support = engine.supports(variant)
    if not support or not support.native:
        return support.reason or f"{support.native_format} competes with nobody"
    with closing(engine.load(variant, folder / "engines")) as session:
        decode, prefill = alone(session, config)
        work = Work(config, session.weight_bytes_per_token, session.kv_bytes_per_position, session.arithmetic)
        kernel = session.kernel
        if case.engine in SEQUENTIAL:
            return Result(decode, prefill, math.nan, kernel, work)
    with closing(replace(case, slots=USERS).options().load(variant, folder / "engines")) as session:
        return Result(decode, prefill, users(session, config), kernel, work)


def quietly(case: Case, shape: str, folder: Path) -> tuple[Result | str, bool]:
    """Measured again where others computed meanwhile; whether it was quiet in the end."""
    for _ in range(ATTEMPTS):
        with (
            Watch(cores=cores(case.threads)) as watch,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        ):
            result = pool.submit(measure, case, shape, folder).result()
        if watch.conditions.quiet or isinstance(result, str):
            return result, True
    return result, False


def show(console: Console, shape: str, results: dict[Case, list[Result]], roofs: dict[str, object], noisy: int) -> None:
    table = Table("engine", "format", "kernel", "decode", "MBU", "prefill", "MFU", f"{USERS} users", title=shape)
    for case, found in results.items():
        work = found[0].work
        middle = {name: statistics.median(getattr(one, name) for one in found) for name in ("decode", "prefill")}
        decode = decoding(work, PROMPT, DECODED, 1 / middle["decode"], roofs)
        prefill = prefilling(work, PREFILLED, PREFILLED / middle["prefill"], roofs)
        shares = [f"{value:.0%}" if value is not None else "-" for value in (decode["mbu"], prefill["mfu"])]
        columns = [spread([getattr(one, name) for one in found]) for name in ("decode", "prefill", "together")]
        table.add_row(
            case.engine, case.format, found[0].kernel, columns[0], shares[0], columns[1], shares[1], columns[2]
        )
    console.print(table)
    if noisy:
        console.print(f"{noisy} measurements were disturbed each time they were made")


def spread(values: list[float]) -> str:
    if math.isnan(values[0]):
        return "one by one"
    return f"{statistics.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}]"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for engine in options.engines.split(","):
        for name in options.formats.split(","):
            yield Case(engine, name, options.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="15m,110m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--formats", default="float32,bfloat16,int8,int4")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)))
    console = Console(highlight=False, width=130)
    roofs = ceilings(options.threads, cores=cores(options.threads))
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            made(shape, folder)
            results: dict[Case, list[Result]] = {}
            order, noisy = list(cases(options)), 0
            for number in range(options.rounds):
                for case in order[:: -1 if number % 2 else 1]:
                    result, quiet = quietly(case, shape, folder)
                    noisy += not quiet
                    if isinstance(result, Result):
                        results.setdefault(case, []).append(result)
                    elif not number:
                        console.print(f"{case.engine} does not run {case.format}: {result}")
            show(console, shape, {case: results[case] for case in order if case in results}, roofs, noisy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
