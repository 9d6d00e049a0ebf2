"""What there is to read of a fit: samples of what the model writes while it learns, and a summary when it is done.

A loss says how far, not what: at 3 nats a small model repeats one phrase, at 2 its sentences begin to hold. So every
validation lets the model continue a few prompts, greedily, as an engine would, and what it wrote is kept with the run.

The summary is the description of the run: what was learnt, how fast, and what the model will cost where it is used.
Those figures are arithmetic on its shape and this machine's ceilings (`hasten.model.cost`); where these are not
known, it says so.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hasten.artifacts import Json
from hasten.model.cost import cost_of
from hasten.model.cost_report import KV_BYTES, USUAL_PROMPT, Floor, floor, rate_of, si
from hasten.model.layout import Format
from hasten.model.network import Network
from hasten.model.shape import Shape


class Reader(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def eos_id(self) -> int: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Story:
    """What a fit has to tell when it is over; None for what was never measured.

    planned_steps: more than `steps` if it stopped early. resumed_at_step: 0 if it ran in one go; speed, MFU and memory
    are since then. validation: the figures of the weights that are kept, taken at `validated_at_step`.
    tokens_per_second: the median of `intervals`. mfu: the share of this machine's measured FLOPs per second.
    """

    title: str
    steps: int
    planned_steps: int
    tokens: int
    resumed_at_step: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    validated_at_step: int = 0
    tokens_per_second: float | None = None
    intervals: int = 0
    mfu: float | None = None
    memory_bytes: float | None = None


def samples(model: Network, prompts: Sequence[Sequence[int]], tokenizer: Reader, tokens: int) -> str:
    """What the model writes after each prompt (token ids, at least one), as Markdown.

    tokens: at most so many each; it stops where it ends the text itself, and where its context ends.
    """
    parts = []
    for number, prompt in enumerate(prompts, 1):
        written = continued(model, prompt, tokens, tokenizer.eos_id)
        ended = bool(written) and written[-1] == tokenizer.eos_id
        ending = "ends the text here" if ended else f"was stopped after {len(written)} tokens"
        parts.append(
            f"### {number}\n\nPrompt:\n\n{verbatim(tokenizer.decode(prompt))}\n\n"
            f"The model writes:\n\n{verbatim(tokenizer.decode(written))}\n\nand {ending}.\n"
        )
    return "\n".join(parts)


def verbatim(text: str) -> str:
    """A block that Markdown leaves alone, whatever is in it."""
    return textwrap.indent(text or " ", "    ", lambda line: True)


def continued(model: Network, prompt: Sequence[int], tokens: int, eos_id: int) -> list[int]:
    """Greedy decoding: up to `tokens` ids after those of the prompt, the last one `eos_id` if the model chose it.

    A prompt that leaves no room in the context loses its beginning, but not its last token.
    """
    tokens = min(tokens, model.config.context - 1)
    prompt = prompt[-(model.config.context - tokens) :]
    device = model.lm_head.weight.device
    state = model.new_state(1, len(prompt) + tokens, torch.float32, device)
    ids = torch.tensor([list(prompt)], device=device)  # (1, T)
    written: list[int] = []
    with torch.no_grad():
        while len(written) < tokens and (not written or written[-1] != eos_id):
            ids = model(ids, state)[:, -1].argmax(-1, keepdim=True)  # (1, 1)
            written.append(int(ids))
    return written


def summary(story: Story, shape: Shape, ceilings: Json | None = None) -> str:
    """A paragraph and a table, Markdown."""
    rows = {**learning(story), **running(story), **using(shape, ceilings)}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    # MLflow's page shows no table whose head is empty or whose rule has single dashes.
    return f"{told(story, cost_of(shape).parameters)}\n\n| figure | value |\n|---|---|\n{table}\n"


def told(story: Story, parameters: int) -> str:
    """The paragraph."""
    parts = [f"`{story.title}`: {parameters:,} parameters, {story.steps:,} steps, {story.tokens:,} tokens."]
    if story.steps < story.planned_steps:
        parts.append(f"It stopped before step {story.planned_steps:,}, as validation did not get better any more.")
    if 0 < story.validated_at_step < story.steps:
        parts.append(f"The weights kept are those of step {story.validated_at_step:,}, the best there were.")
    if story.resumed_at_step:
        parts.append(f"It went on from step {story.resumed_at_step:,}; speed and memory are since then.")
    return " ".join(parts)


def learning(story: Story) -> dict[str, str]:
    """What was learnt."""
    first, last = story.first_loss, story.last_loss
    loss = "not logged" if first is None or last is None else f"{first:.3f} → {last:.3f}"
    figures = ", ".join(f"{name} {value:.3f}" for name, value in story.validation.items())
    step = f" (step {story.validated_at_step:,})" if figures else ""
    return {"training loss": loss, "validation": f"{figures or 'none'}{step}"}


def running(story: Story) -> dict[str, str]:
    """What it took."""
    speed, memory = story.tokens_per_second, story.memory_bytes
    return {
        "tokens per second": "not logged" if speed is None else f"{speed:,.0f} (median of {story.intervals} intervals)",
        "MFU": "not known: no ceiling of this machine" if story.mfu is None else f"{100 * story.mfu:.1f}%",
        "memory of the first process": "not logged" if memory is None else si(memory, "B"),
    }


def using(shape: Shape, ceilings: Json | None) -> dict[str, str]:
    """What decoding one token will cost, weights in bfloat16, the state in 16 bits."""
    least, place = least_time(shape, ceilings), min(USUAL_PROMPT, shape.context)
    shown = "not known: `python pipelines/ceilings.py` measures how fast this machine reads"
    if least:
        shown = f"{1 / least.seconds:,.0f} tokens/s" + (f", bound by {least.bound}" if least.bound else "")
    return {
        "weights read per decoded token, bfloat16": si(cost_of(shape).weight_bytes_per_token(Format.floats(2)), "B"),
        f"decoding token {place:,} on this machine, at best": shown,
    }


def costs(shape: Shape, ceilings: Json | None) -> dict[str, float | None]:
    """What the model costs to run, so that fits can be compared by it: parameters, bytes of weights (bfloat16) that
    decoding a token reads, and the tokens per second that this machine's roofline allows; None without ceilings.
    """
    cost, least = cost_of(shape), least_time(shape, ceilings)
    return {
        "parameters": cost.parameters,
        "weight_bytes_per_token": cost.weight_bytes_per_token(Format.floats(2)),
        "decode_tokens_per_second_at_most": 1 / least.seconds if least else None,
    }


def least_time(shape: Shape, ceilings: Json | None) -> Floor | None:
    """In which this machine can decode a token after a usual prompt."""
    if ceilings is None:
        return None
    cost, place = cost_of(shape), min(USUAL_PROMPT, shape.context)
    read = cost.weight_bytes_per_token(Format.floats(2)) + cost.kv_bytes_read(place, KV_BYTES)
    return floor(read, cost.decode_flops(place), rate_of("bfloat16", ceilings)[0], ceilings)
