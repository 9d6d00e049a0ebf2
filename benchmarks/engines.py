"""How fast is every engine, and how far from this machine's limits? Engines x formats on shapes with random weights.

    python benchmarks/engines.py                     # 15M and 110M parameters; some 40 minutes on two cores
    python benchmarks/engines.py --shapes 110m --engines native,transformers:compile=true --rounds 3
    python benchmarks/engines.py --shapes 1b,gemma3-270m --engines native,llamacpp --quick    # does it run?

Three figures each, in tokens/s: decoding (128 tokens after a prompt of 16, alone), prefill (512 tokens, alone) and
eight users at once (64 tokens each after 16). In a round every case runs in a fresh process, one after the other, the
next round in reverse; a case that was disturbed is repeated. Printed are medians over rounds with the lowest and
highest, what share of the memory bandwidth decoding used (MBU), and of the arithmetic of its number format prefill did
(MFU), against ceilings measured before (`python pipelines/ceilings.py`). Compiling is apart, in seconds, the longest of
all rounds: later ones find what the first made. An engine's own options follow its name, between colons.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from hasten.artifacts import Checkpoint, Variant
from hasten.ceilings import ceilings
from hasten.compression.base import Compressor
from hasten.compression.identity import Identity
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.config import discover
from hasten.engine.base import Dtype, Engine, Request, Session
from hasten.errors import UserError
from hasten.evaluation.conditions import Watch
from hasten.evaluation.roofline import Work, decoding, prefilling
from hasten.hardware import THREAD_VARIABLES, cores, cpu_count
from hasten.model.config import Activation, ModelConfig

PROMPT, USERS = 16, 8
LARGE: dict[str, int] = {"vocab_size": 32000, "context": 1024}
SHAPES = {
    "15m": ModelConfig(layers=6, hidden_size=288, heads=6, kv_heads=6, feed_forward_size=768, **LARGE),
    "110m": ModelConfig(layers=12, hidden_size=768, heads=12, kv_heads=12, feed_forward_size=2048, **LARGE),
    "1b": ModelConfig(layers=16, hidden_size=2048, heads=32, kv_heads=8, feed_forward_size=8192, **LARGE),
    "gemma3-270m": ModelConfig(
        layers=18, hidden_size=640, heads=4, kv_heads=1, head_size=256, feed_forward_size=2048, vocab_size=262144,
        context=1024, head_norm=True, post_norms=True, offset_norms=True, embedding_scale=True, norm_epsilon=1e-6,
        activation=Activation.gelu_tanh, sliding_window=512, rope_theta=1e6, local_rope_theta=1e4,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 3,
    ),
}  # fmt: skip
METHODS: dict[str, Compressor] = {
    "float": Identity(),
    "int8": Rtn(bits=8, group_size=32),
    "int8-rows": Rtn(bits=8, group_size=0),
    "int4": Rtn(bits=4, group_size=32),
}
FORMATS = {"float32": ("float", Dtype.float32), "bfloat16": ("float", Dtype.bfloat16)}  # others: the variant's own
CONVERTED = ("Q4_0", "Q4_K_M")
"""Of the float variant, by llama.cpp itself."""


@dataclass(frozen=True)
class Load:
    """decoded: tokens of one user alone. prefilled: of a prompt. each: of one of several users. repeats: of each.
    attempts: how often all is measured until nothing disturbs.
    """

    decoded: int = 128
    prefilled: int = 512
    each: int = 64
    repeats: int = 3
    attempts: int = 3


QUICK = Load(decoded=8, prefilled=32, each=4, repeats=1, attempts=1)


@dataclass(frozen=True)
class Case:
    """An engine, maybe with options (`transformers:compile=true`), on a format. slots: requests at the same time."""

    engine: str
    format: str
    threads: int
    slots: int = 1

    @property
    def variant(self) -> str:
        return "float" if self.format in CONVERTED else FORMATS.get(self.format, (self.format, None))[0]

    @property
    def kind(self) -> type[Engine]:
        return discover("engine")[self.engine.split(":")[0]]

    def options(self) -> Engine:
        options: dict[str, Any] = {"threads": self.threads, "max_context": 1024}
        options["weight_dtype"] = FORMATS.get(self.format, (None, Dtype.auto))[1]
        if any(field.name == "slots" for field in fields(self.kind)):
            options["slots"] = self.slots
        if self.format in CONVERTED:
            from hasten.engine.llamacpp.conversion import Conversion

            options["conversion"] = Conversion(self.format)
        own = OmegaConf.from_dotlist(self.engine.split(":")[1:])
        engine = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(self.kind), options, own))
        assert isinstance(engine, Engine)
        return engine


@dataclass(frozen=True)
class Result:
    """Tokens per second, and what was loaded. together: of all users, NaN for engines that take them one by one.
    compiling: seconds.
    """

    decode: float
    prefill: float
    together: float
    compiling: float
    kernel: str
    work: Work


def prompt(length: int, config: ModelConfig) -> tuple[int, ...]:
    import torch

    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(3, config.vocab_size, (length,), generator=generator).tolist())


def write_parent(config: ModelConfig, folder: Path) -> None:
    """`folder/parent`: a float32 checkpoint of this shape, with random weights."""
    import torch

    from hasten.model.config_json import to_huggingface
    from hasten.model.decoder import Decoder
    from hasten.model.huggingface import network_tensors, save_checkpoint

    model = Decoder(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
    described = to_huggingface(config, bos_id=0, eos_id=1, pad_id=2)
    save_checkpoint(folder / "parent", described, network_tensors(model), folder, {"kind": "checkpoint"})


def made(name: str, variants: Collection[str], folder: Path) -> None:
    """The shape's variants, with random weights, in `folder`: in a process of its own, whose memory goes with it."""
    write_parent(SHAPES[name], folder)
    for variant in variants:
        parent = Checkpoint(folder / "parent")
        make_variant(METHODS[variant], parent, None, name=variant, target=folder / variant, seed=0)


def alone(session: Session, config: ModelConfig, load: Load) -> tuple[float, float]:
    """Decoding and prefill."""
    decode, prefill = [], []
    list(session.submit(Request(0, prompt(PROMPT, config), 8)))
    for number in range(load.repeats):
        tokens = list(session.submit(Request(number, prompt(PROMPT, config), load.decoded)))
        decode.append((load.decoded - 1) / (tokens[-1].seconds - tokens[0].seconds))
        (first,) = session.submit(Request(number, prompt(load.prefilled, config), 1))
        prefill.append(load.prefilled / first.seconds)
    return statistics.median(decode), statistics.median(prefill)


def users(session: Session, config: ModelConfig, load: Load) -> float:
    def once() -> float:
        streams = [session.submit(Request(i, prompt(PROMPT + i % 2, config), load.each)) for i in range(USERS)]
        return USERS * load.each / max(list(stream)[-1].seconds for stream in streams)

    once()
    return statistics.median(once() for _ in range(load.repeats))


def measure(case: Case, shape: str, load: Load, folder: Path) -> Result | str:
    """In a process of its own: figures, or why there are none."""
    config, variant = SHAPES[shape], Variant(folder / case.variant)
    try:
        engine = case.options()
    except UserError as error:
        return str(error)
    support = engine.supports(variant)
    if not support or not support.native:
        return support.reason or f"{support.native_format} competes with nobody"
    with closing(engine.load(variant, folder / "engines")) as session:
        decode, prefill = alone(session, config, load)
        work = Work(config, session.weight_bytes_per_token, session.kv_bytes_per_position, session.arithmetic)
        result = Result(decode, prefill, math.nan, session.compile_seconds, session.kernel, work)
    if not case.kind.batches:
        return result
    with closing(replace(case, slots=USERS).options().load(variant, folder / "engines")) as session:
        return replace(result, together=users(session, config, load))


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Called in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def quietly(case: Case, shape: str, load: Load, folder: Path) -> tuple[Result | str, bool]:
    """Measured again where others computed meanwhile; whether it was quiet in the end."""
    for _ in range(load.attempts):
        with Watch(cores=cores(case.threads)) as watch:
            result = apart(measure, case, shape, load, folder)
        if watch.conditions.quiet or isinstance(result, str):
            return result, True
    return result, False


def show(
    console: Console, shape: str, results: dict[Case, list[Result]], load: Load, roofs: dict[str, object], noisy: int
) -> None:
    columns = ["engine", "format", "kernel", "decode", "MBU", "prefill", "MFU", f"{USERS} users", "compiling"]
    table = Table(*columns, title=shape)
    for case, found in results.items():
        work = found[0].work
        middle = {name: statistics.median(getattr(one, name) for one in found) for name in ("decode", "prefill")}
        decode = decoding(work, PROMPT, load.decoded, 1 / middle["decode"], roofs)
        prefill = prefilling(work, load.prefilled, load.prefilled / middle["prefill"], roofs)
        shares = [f"{value:.0%}" if value is not None else "-" for value in (decode["mbu"], prefill["mfu"])]
        speeds = [spread([getattr(one, name) for one in found]) for name in ("decode", "prefill", "together")]
        compiling = f"{seconds:.0f} s" if (seconds := max(one.compiling for one in found)) else "-"
        figures = [speeds[0], shares[0], speeds[1], shares[1], speeds[2], compiling]
        table.add_row(case.engine, case.format, found[0].kernel, *figures)
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
            if name not in CONVERTED or engine.split(":")[0] == "llamacpp":
                yield Case(engine, name, options.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="15m,110m", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--engines", default=",".join(discover("engine")))
    formats = [*FORMATS, *list(METHODS)[1:], *CONVERTED]
    parser.add_argument(
        "--formats",
        default="float32,bfloat16,int8,int8-rows,int4,Q4_K_M",
        help=f"of {', '.join(formats)}; the last two are llama.cpp's own",
    )
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few tokens, once: whether it runs, not how fast")
    options = parser.parse_args()
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(options.threads)))
    console = Console(highlight=False, width=140)
    load, rounds = (QUICK, 1) if options.quick else (Load(), options.rounds)
    roofs = ceilings(options.threads, cores=cores(options.threads))
    order = list(cases(options))
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            apart(made, shape, sorted({case.variant for case in order}), folder)
            results: dict[Case, list[Result]] = {}
            noisy = 0
            for number in range(rounds):
                for case in order[:: -1 if number % 2 else 1]:
                    result, quiet = quietly(case, shape, load, folder)
                    noisy += not quiet
                    if isinstance(result, Result):
                        results.setdefault(case, []).append(result)
                    elif not number:
                        console.print(f"{case.engine} does not run {case.format}: {result}")
            show(console, shape, {case: results[case] for case in order if case in results}, load, roofs, noisy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
