"""What a model costs, and what this machine's roofline makes of it, as two tables.

    python -m hasten.model.cost model=1b
    python -m hasten.model.cost model=tiny model.vocab_size=8192 model.layers=12 prompt_tokens=256
    python -m hasten.model.cost model=huggingface model.path=DIR_OR_ID    # reads its config.json alone

The floor of a time is max(bytes / bandwidth, FLOPs / rate) (`hasten.model.cost`); bandwidth, at the working set of the
phase, and rate are those measured on this machine (`hasten.ceilings`). No engine decodes faster than that; how
near one comes is what stage `evaluate` measures.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from hasten.artifacts import Json, read_json
from hasten.ceilings import are_known, ceilings, read_rate, record_path
from hasten.config import QUIET, build, fail, register, user_sentence
from hasten.errors import UserError
from hasten.hardware import cores, cpu_count, machine
from hasten.model.cost import NetworkCost, cost_of
from hasten.model.imported import Huggingface
from hasten.model.layout import BLOCK, Format
from hasten.model.recipe import ModelRecipe
from hasten.model.shape import Shape, read_shape

if TYPE_CHECKING:
    from rich.table import Table

USUAL_PROMPT = 512
KV_BYTES = 2
"""Of an element of the KV cache: engines keep it in 16 bits."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass
class CostOptions:
    """prompt_tokens: of the prefill, and how far decoding is from the start; 0 means 512 or all of a shorter context.

    group_size: neighbouring weights that share a scale in int8 and int4, 0 means a whole row. device: whose roofline.
    """

    model: ModelRecipe = MISSING
    prompt_tokens: int = 0
    group_size: int = 32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0:
            raise UserError(f"prompt_tokens must be 0 (512, or the context) or more, got {self.prompt_tokens}")
        if self.group_size < 0:
            raise UserError(f"group_size must be 0 (whole row) or more, got {self.group_size}")


@dataclass(frozen=True)
class Floor:
    """The least time of a phase. bound: `memory` or `compute`; None where the rate is not known."""

    seconds: float
    bound: str | None


def main(arguments: list[str]) -> None:
    """Print the report. Whatever the user can mend ends as one sentence on stderr and exit code 2."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    try:
        options = composed(arguments)
        shape = shape_of(options.model)
        prompt = prompt_of(options, shape)
        name = next((text.partition("=")[2] for text in arguments if text.startswith("model=")), "1b")
        show(name, shape, prompt, options, *ceilings_here(options.device))
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        fail("cost", sentence)


def composed(arguments: list[str]) -> CostOptions:
    """`conf/model/` and the command line, as stages read them. Raises `UserError` for what is unknown or missing."""
    import hydra
    from hydra.core.config_store import ConfigStore

    if odd := [text for text in arguments if "=" not in text and not text.startswith("~")]:
        options = "model=NAME, model.FIELD=VALUE, prompt_tokens=N, group_size=N, device=NAME"
        raise UserError(f"options are {options}, got {odd[0]!r}")
    register("cost", CostOptions, axes=())
    ConfigStore.instance().store(name="cost", node={"defaults": ["base_cost", {"model": "1b"}]})
    with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        return build(CostOptions, hydra.compose("cost", arguments))


def shape_of(recipe: ModelRecipe) -> Shape:
    """The shape that would be trained, or that of the checkpoint that would be imported."""
    if isinstance(recipe, Huggingface):
        from hasten.sources import Wanted, resolve

        source = resolve(recipe.path, recipe.revision, recipe.accept_licence, wanted=Wanted.config)
        return read_shape(read_json(source / "config.json"))
    assert isinstance(recipe, Shape)
    if not recipe.vocab_size:
        raise UserError("model.vocab_size must be given here (0 stands for a tokenizer's), such as 8192, got 0")
    return recipe


def prompt_of(options: CostOptions, shape: Shape) -> int:
    """Tokens of the prefill. Raises `UserError` if the context does not hold them."""
    if options.prompt_tokens > shape.context:
        raise UserError(f"prompt_tokens must fit model.context ({shape.context}), got {options.prompt_tokens}")
    return options.prompt_tokens or min(USUAL_PROMPT, shape.context)


def ceilings_here(device: str) -> tuple[Json, str]:
    """This machine's ceilings with all its cores, and where they are from. Raises `UserError` if there are none."""
    threads = cpu_count()
    known, path = are_known(threads, device), record_path(machine()["id"], threads, device)
    if not known:
        sys.stderr.write("measuring how fast this machine reads and multiplies, about 20 s\n")
    try:
        found = ceilings(threads, device, cores=cores(threads))
    except RuntimeError as error:
        raise UserError(str(error)) from None
    origin = f"kept in {path}" if known else f"measured now, kept in {path}"
    return found, f"Ceilings: {device}, {found['threads']} threads, {found['date']} ({found['validity']}), {origin}"


def show(name: str, shape: Shape, prompt: int, options: CostOptions, found: Json, origin: str) -> None:
    from rich.console import Console

    cost = cost_of(shape)
    console = Console(highlight=False)
    console.print(counts(name, shape, cost, prompt))
    table, notes = floors(cost, prompt, options.group_size, found)
    console.print(table)
    for note in (*notes, origin):
        console.print(note, soft_wrap=True)


def counts(name: str, shape: Shape, cost: NetworkCost, prompt: int) -> Table:
    """What does not depend on the machine."""
    from rich.table import Table

    rows = {
        "parameters": f"{cost.parameters:,}",
        "parameters read per decoded token": f"{cost.parameters_per_token:,}",
        "state of one token (KV cache, 16 bits)": si(cost.kv_bytes(1, KV_BYTES), "B"),
    }
    for length in sorted({prompt, shape.context}):
        held, read = (si(count(length, KV_BYTES), "B") for count in (cost.kv_bytes, cost.kv_bytes_read))
        rows[f"state of {length:,} tokens"] = held if held == read else f"{held}, the last reads {read}"
    rows[f"FLOPs of decoding token {prompt:,}"] = si(cost.decode_flops(prompt), "FLOP")
    rows[f"FLOPs of a prefill of {prompt:,} tokens"] = si(cost.prefill_flops(prompt, logits=1), "FLOP")
    trained = cost.training_flops(shape.context, shape.context) / shape.context
    rows[f"FLOPs of training per token, {shape.context:,} at a time"] = si(trained, "FLOP")
    table = Table(title=name, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows.items():
        table.add_row(*row)
    return table


def floors(cost: NetworkCost, prompt: int, group_size: int, found: Json) -> tuple[Table, list[str]]:
    """The roofline in every format of the weights, and what has to be said about it."""
    from rich.table import Table

    from hasten.model.grid import Grid

    grids = {"int8": Grid(8, group_size), "int4": Grid(4, group_size)}
    kinds: dict[str, tuple[Format, Format]] = {  # on disk, and as engines read it
        "float32": (Format.floats(4), Format.floats(4)),
        "bfloat16": (Format.floats(2), Format.floats(2)),
        **{kind: (Format.stored(grid), Format.packed(grid)) for kind, grid in grids.items()},
    }
    headers = ["weights", "on disk", "bytes/token", "tokens/s", "bound by", "prefill", "bound by"]
    title = f"At best on this machine: decoding token {prompt:,}, and a prefill of {prompt:,} tokens"
    table = Table(*headers, title=title, title_justify="left")
    sharing = f"{group_size} weights share" if group_size else "a row shares"
    repeated = f", repeated every {BLOCK} as llama.cpp does" if group_size > BLOCK and group_size % BLOCK == 0 else ""
    scale = f"a scale of 16 bits (32 on disk){repeated}"
    notes = [f"int8 and int4: {sharing} {scale}, the head is quantised too, activations are int8."]
    for kind, (stored, held) in kinds.items():
        try:
            on_disk, weights = cost.weight_bytes(stored), cost.weight_bytes_per_token(held)
        except UserError as error:
            table.add_row(kind, *["-"] * 6)
            notes.append(f"{kind}: {error}.")
            continue
        wanted = "int8" if kind.startswith("int") else kind
        rate, note = rate_of(wanted, found)
        notes += [note] if note and note not in notes else []
        decode = floor(weights + cost.kv_bytes_read(prompt, KV_BYTES), cost.decode_flops(prompt), rate, found)
        prefill_bytes = cost.prefill_weight_bytes(held) + cost.kv_bytes(prompt, KV_BYTES)
        prefill = floor(prefill_bytes, cost.prefill_flops(prompt, logits=1), rate, found)
        speed = f"{round(1 / decode.seconds):,}" if decode.seconds < 0.01 else f"{1 / decode.seconds:.3g}"
        phases = (speed, decode.bound or "?", si(prefill.seconds, "s"), prefill.bound or "?")
        table.add_row(kind, si(on_disk, "B"), si(weights, "B"), *phases)
    return table, notes


def rate_of(arithmetic: str, found: Json) -> tuple[float | None, str]:
    """FLOPs per second in a number format, and a note where it is not that format's own: float32 stands in for it."""
    rates = found["matmul_flops_per_second"]
    if rates.get(arithmetic):
        return rates[arithmetic], ""
    reason = found["why"].get(f"matmul_flops_per_second.{arithmetic}", f"no ceiling is known for {arithmetic}")
    if rates.get("float32"):
        return rates["float32"], f"{arithmetic}: {reason}; the rate of float32 stands in for it."
    return None, f"{arithmetic}: {reason}; what arithmetic takes is left out."


def floor(read_bytes: int, flops: int, rate: float | None, found: Json) -> Floor:
    """The least time in which this machine can read so much and compute so much."""
    memory = read_bytes / read_rate(found, read_bytes)
    if rate is None:
        return Floor(memory, None)
    compute = flops / rate
    return Floor(max(memory, compute), "memory" if memory >= compute else "compute")


def si(value: float, unit: str) -> str:
    """Three digits and a prefix: 1.24 GB, 320 ms."""
    if 0 < value < 1:
        thousandths = next((n for n in (1, 2) if value * 1000**n >= 1), 3)
        return f"{value * 1000**thousandths:.3g} {('m', 'µ', 'n')[thousandths - 1]}{unit}"
    power = 0
    while value >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {PREFIXES[power]}{unit}"
