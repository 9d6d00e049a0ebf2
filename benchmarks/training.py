"""How fast does hasten train? In turns with transformers' Trainer and with loops written by hand, on this machine.

    python benchmarks/training.py          # half an hour on two cores; needs accelerate (pip install accelerate)
    python benchmarks/training.py --model gpt2 --length 1024 --batch 16 --steps 20 --device cuda --compile
    python benchmarks/training.py --overhead --model tiny --steps 30 --rounds 8   # what it costs to be watched

Every contender (`benchmarks/contenders.py`) trains the same shape on the same sequences with AdamW (fused), clipped
gradients and, unless told otherwise, bfloat16 autocast, in a process of its own, with the same threads on equal cores:

    hasten     the stages' own fit, watched by nobody
    trainer    transformers.Trainer on LlamaForCausalLM, with the fast settings that it offers
    textbook   a Llama and its loop as one writes them by hand, with the cross-entropy over all logits
    bare       hasten's network, loss and optimiser in a loop of ten lines: what the fit adds to them
    muon       hasten with its default optimiser (only if named in --contenders; so are the next three)
    compiled   hasten with compile=true
    apart      hasten with documents that do not attend to each other, its default
    watched    hasten with curves in MLflow (SQLite) and a progress bar

As in `confirm`, a round starts fresh processes, and in a pass each takes a turn of a few steps there and one back while
the others wait; the first turn of a process does not count. All wait in the same place, where the next sequences are
asked for, so a turn lasts from there to there. Printed are the median speeds, MFU against this machine's measured
rate, peak memory, and how many times faster the first contender is than each, with Stein's interval over rounds.

Exits with 1 if hasten is slower than trainer or textbook for certain (the whole interval says so), or unless being
watched costs less than 1%.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from contenders import CONTENDERS, Turn, Work, contend
from rich.console import Console
from rich.table import Table

from hasten.ceilings import ceilings
from hasten.config import QUIET
from hasten.evaluation.conditions import Watch
from hasten.evaluation.speedup import round_log_ratio, speedup
from hasten.evaluation.statistics import Estimate
from hasten.hardware import THREAD_VARIABLES, cores, cpu_count
from hasten.model.config import Activation, ModelConfig, RopeKind
from hasten.model.cost import cost_of
from hasten.model.cost_report import composed

USUAL, OVERHEAD = ["hasten", "trainer", "textbook", "bare"], ["hasten", "watched"]
SETTLE_SECONDS = 0.05  # threads that spin when their work is done must not be in the way of the next turn
MOST_OVERHEAD = 0.01


class Contender:
    """A process that is ready for its turns. A context manager."""

    def __init__(self, name: str, work: Work) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=contend, args=(name, work, theirs))
        self.process.start()
        theirs.close()

    def __enter__(self) -> Contender:
        try:
            self.hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    def turn(self) -> Turn:
        time.sleep(SETTLE_SECONDS)
        self.signal(signal.SIGCONT)
        self.channel.send(True)
        return self.hear()

    def hear(self) -> Turn:
        """What it says at the end of a turn; then it is stopped, its progress bar and all."""
        try:
            said = self.channel.recv()
        except EOFError:
            said = "its process died"
        if not isinstance(said, Turn):
            raise SystemExit(f"{self.name}: {said}")
        self.signal(signal.SIGSTOP)
        return said

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


Played = dict[str, list[list[Turn]]]
"""By contender, pass by pass: the turn there and the turn back."""


def play(names: Sequence[str], work: Work, passes: int) -> tuple[Played, int]:
    """A round of fresh processes; also in how many passes somebody else computed."""
    played: Played = {name: [] for name in names}
    disturbed = 0
    with ExitStack() as stack:
        players = {name: stack.enter_context(Contender(name, work)) for name in names}
        for player in players.values():
            player.turn()  # allocations, compilation: not counted
        for number in range(passes):
            first = number % len(names)
            there = [*names[first:], *names[:first]]
            got: dict[str, list[Turn]] = {name: [] for name in names}
            with Watch([device_of(work.device)], cores=cores(work.threads)) as watch:
                for name in [*there, *there[::-1]]:
                    got[name].append(players[name].turn())
            disturbed += not watch.conditions.quiet
            for name, turns in got.items():
                played[name].append(turns)
    return played, disturbed


def faster(rounds: Sequence[Played], subject: str, other: str) -> Estimate:
    """How many times faster than the other; a single round has no interval."""

    def seconds(name: str) -> list[list[list[float]]]:
        return [[[turn.seconds for turn in turns] for turns in played[name]] for played in rounds]

    found = speedup(seconds(other), seconds(subject), first_stage=len(rounds))
    if isinstance(found, Estimate):
        return found
    return Estimate(math.exp(round_log_ratio(seconds(other)[0], seconds(subject)[0])), math.nan, math.nan, len(rounds))


def turns_of(rounds: Sequence[Played], name: str) -> list[Turn]:
    return [turn for played in rounds for turns in played[name] for turn in turns]


def show(console: Console, rounds: Sequence[Played], work: Work, rate: float | None) -> None:
    """The table: the first contender against all others."""
    subject, *others = rounds[0]
    flops = cost_of(work.config).training_flops(work.tokens, work.length)
    table = Table("", "tokens/s", "ms/step", "MFU", "peak memory (GB)", "of it libraries", f"{subject}'s speed-up")
    for name in rounds[0]:
        turns = turns_of(rounds, name)
        typical = statistics.median(turn.seconds for turn in turns)
        mfu = f"{flops / typical / rate:.0%}" if rate else "unknown"
        memory = [f"{max(getattr(turn, field) for turn in turns) / 1e9:.2f}" for field in ("peak", "libraries")]
        ratio = ""
        if name in others:
            found = faster(rounds, subject, name)
            ratio = f"{found.value:.3f}x" + ("" if math.isnan(found.low) else f" [{found.low:.3f}, {found.high:.3f}]")
        table.add_row(name, f"{work.tokens / typical:,.0f}", f"{1000 * typical / work.steps:.0f}", mfu, *memory, ratio)
    console.print(table)


def tell_overhead(console: Console, rounds: Sequence[Played]) -> bool:
    """Whether being watched costs less than 1%.

    All that watching does is done in one callback, which the training waits for, and in two threads, which may keep a
    core from it for as long as they compute: together they are the most that it costs, and they can be measured where
    two processes cannot be told apart by 1%.
    """
    turns = turns_of(rounds, OVERHEAD[1])
    seconds = sum(turn.seconds for turn in turns)
    inside, beside = (sum(getattr(turn, name) for turn in turns) / seconds for name in ("inside", "beside"))
    found = faster(rounds, *OVERHEAD)
    console.print(
        f"being watched costs at most {inside + beside:.3%} of the time: {inside:.3%} in its callback and {beside:.3%} "
        f"in threads that send and draw; beside a process that nobody watches {found.value - 1:+.2%} "
        f"[{found.low - 1:+.2%}, {found.high - 1:+.2%}]",
        markup=False,  # brackets are meant
        soft_wrap=True,
    )
    return inside + beside < MOST_OVERHEAD and not found.low - 1 > MOST_OVERHEAD


def device_of(kind: str) -> str:
    return "cuda:0" if kind == "cuda" else "cpu"


def work_of(options: argparse.Namespace, folder: Path) -> Work:
    """What is asked for, in that folder."""
    config = composed([f"model={options.model}"]).model
    if not isinstance(config, ModelConfig):
        raise SystemExit(f"--model must be a decoder that is trained here, got {options.model}")
    config.vocab_size = config.vocab_size or options.vocabulary
    odd = (config.qkv_bias, config.output_bias, config.mlp_bias, config.head_norm, config.post_norms,
           config.offset_norms, config.embedding_scale, config.sliding_window, config.attention_scale,
           config.activation is not Activation.silu, config.rope_scaling.kind is not RopeKind.default)  # fmt: skip
    if any(odd) or options.length > config.context:
        raise SystemExit(f"--model must be a plain Llama and --length at most its context ({config.context})")
    low, turns = options.precision == "bfloat16", 1 + 2 * options.passes
    size = (options.batch, options.length, options.steps, turns)
    return Work(config, *size, low, options.device, options.threads, options.compile, folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="small", help="an entry of conf/model")
    parser.add_argument("--vocabulary", type=int, default=8192, help="where the model leaves it to the tokenizer")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--compile", action="store_true", help="everybody's network through torch.compile")
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--passes", type=int, default=3, help="turns there and back per round")
    parser.add_argument("--rounds", type=int, default=5, help="of fresh processes")
    parser.add_argument("--contenders", default=",".join(USUAL), help="the first is compared with the others")
    parser.add_argument("--overhead", action="store_true", help="the same as --contenders hasten,watched")
    options = parser.parse_args()
    chosen = options.contenders = OVERHEAD if options.overhead else options.contenders.split(",")
    if not set(chosen) <= CONTENDERS.keys() or not 2 <= len(chosen) == len(set(chosen)):
        parser.error(f"--contenders must be two or more of {', '.join(CONTENDERS)}, got {','.join(chosen)}")
    for name in ("vocabulary", "batch", "length", "threads", "steps", "passes", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main() -> int:
    options, console = arguments(), Console(highlight=False, width=120)
    os.environ.update({**QUIET, **dict.fromkeys(THREAD_VARIABLES, str(options.threads))})  # for the contenders
    device, rounds = device_of(options.device), []
    with tempfile.TemporaryDirectory() as name:
        work = work_of(options, Path(name))
        roofs = ceilings(options.threads, device, cores=cores(options.threads))
        console.print(
            f"{options.model}, {cost_of(work.config).parameters / 1e6:.1f}M parameters; {work.batch} x {work.length} "
            f"tokens a step, {options.precision}, {device}, {work.threads} threads; turns of {work.steps} steps, "
            f"{options.passes} passes a round",
            soft_wrap=True,
        )
        subject, *others = options.contenders
        for number in range(options.rounds):
            played, disturbed = play(options.contenders, work, options.passes)
            rounds.append(played)
            ratios = ", ".join(f"{faster([played], subject, other).value:.3f}x as fast as {other}" for other in others)
            busy = f"; others computed in {disturbed} of {options.passes} passes" if disturbed else ""
            console.print(f"round {number + 1}: {subject} is {ratios}{busy}", soft_wrap=True)
    show(console, rounds, work, roofs["matmul_flops_per_second"][options.precision])
    good = not options.overhead or tell_overhead(console, rounds)
    rivals = {"trainer", "textbook"} & set(others) if subject == "hasten" else set()
    return 0 if good and not any(faster(rounds, subject, rival).high < 1 for rival in rivals) else 1


if __name__ == "__main__":
    sys.exit(main())
