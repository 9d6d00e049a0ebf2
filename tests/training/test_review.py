from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten.model.network import Network
from hasten.tokenizer.base import load_tokenizer
from hasten.training.review import Story, continued, costs, samples, summary
from tests.tiny import decoder, lstm, shape, write_tokenizer

NEVER = -1  # an end that no model chooses


def recomputed(model: Network, prompt: Sequence[int], tokens: int) -> list[int]:
    """Greedy decoding the slow way: everything again for every token, without a state."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            hidden = model.hidden(torch.tensor([ids]), torch.tensor([len(prompt)]))  # (1, T, hidden)
            ids.append(int(model.lm_head(hidden)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", [decoder, lstm])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sample_is_what_greedy_decoding_gives(make: type[Network], seed: int) -> None:
    model = make(seed=seed)
    for prompt in ([5], [0, 7, 9, 30], list(range(3, 40))):
        written = continued(model, prompt, 12, NEVER)
        assert written == recomputed(model, prompt, 12)
    assert len(set(continued(model, [0, 7, 9, 30], 12, NEVER))) > 1  # so that a wrong one could be told


def test_a_sample_ends_where_the_model_ends_it() -> None:
    model = decoder()
    free = continued(model, [0, 7, 9], 10, NEVER)
    end = free[4]
    assert continued(model, [0, 7, 9], 10, end) == free[: free.index(end) + 1]


@pytest.mark.parametrize("tokens", [1, 10, 63, 64, 1000])
@pytest.mark.parametrize("length", [1, 60, 64, 300])
def test_a_sample_fits_the_context_whatever_is_asked(tokens: int, length: int) -> None:
    model, prompt = decoder(shape(context=64)), [3 + place % 90 for place in range(length)]
    written = continued(model, prompt, tokens, NEVER)
    assert len(written) == min(tokens, 63)
    assert written[0] == continued(model, prompt[-(64 - len(written)) :], 1, NEVER)[0]


def test_samples_show_prompt_and_answer_and_how_it_ended(tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(write_tokenizer(tmp_path / "tokenizer")), decoder()
    free = continued(model, [0, 7, 9], 6, tokenizer.eos_id)
    shown = samples(model, [[0, 7, 9], [0, 30]], tokenizer, 6)
    assert shown.startswith("### 1\n\nPrompt:\n\n    w7 w9\n\nThe model writes:\n\n    ")
    assert f"\n    {tokenizer.decode(free)}\n" in shown
    assert "and was stopped after 6 tokens.\n\n### 2\n\nPrompt:\n\n    w30\n" in shown
    assert samples(model, [], tokenizer, 6) == ""

    ending = replace(tokenizer, eos_id=free[0])
    assert "and ends the text here." in samples(model, [[0, 7, 9]], ending, 6)


def test_what_a_model_writes_is_shown_as_it_is_whatever_markdown_would_make_of_it() -> None:
    class Hostile:
        eos_id = NEVER

        def decode(self, ids: Sequence[int]) -> str:
            return "# no heading\n```\n\n| no | table |"

    lines = samples(decoder(), [[5]], Hostile(), 3).splitlines()
    for line in ("# no heading", "```", "| no | table |"):
        assert lines.count(f"    {line}") == 2
        assert line not in lines


def found(**changes: object) -> dict[str, object]:
    """Ceilings: 1 GB/s, 1 TFLOP/s in bfloat16."""
    reads = [{"working_set_bytes": size, "bytes_per_second": 1e9} for size in (2**10, 2**30)]
    rates = {"float32": 5e11, "bfloat16": 1e12}
    facts = {"read_bytes_per_second": reads, "matmul_flops_per_second": rates, "why": {}, "threads": 2}
    return {"schema": 1, "validity": "valid", "attempts": 1, **facts, **changes}


def story() -> Story:
    return Story(
        title="pretrain",
        steps=1000,
        planned_steps=1000,
        tokens=2_048_000,
        first_loss=9.0123,
        last_loss=3.5,
        validation={"validation_loss": 3.6, "bits_per_byte_en": 1.25},
        validated_at_step=1000,
        tokens_per_second=12_345.6,
        intervals=99,
        mfu=0.4321,
        memory_bytes=812e6,
    )


def test_a_summary_says_what_was_learnt_how_fast_and_what_it_will_cost() -> None:
    config = shape()
    parameters = sum(weight.numel() for weight in decoder(config).parameters())
    weights = 2 * (parameters if config.tied_head else parameters - config.vocab_size * config.hidden_size)
    weights += 0 if config.tied_head else 2 * config.hidden_size
    state = 2 * 2 * config.layers * config.kv_heads * config.head_width * 64  # keys and values of 64 tokens, 16 bits
    paragraph, _, table = summary(story(), config, found()).partition("\n\n")
    assert paragraph == f"`pretrain`: {parameters:,} parameters, 1,000 steps, 2,048,000 tokens."
    assert table.splitlines() == [
        "| figure | value |",
        "|---|---|",
        "| training loss | 9.012 → 3.500 |",
        "| validation | validation_loss 3.600, bits_per_byte_en 1.250 (step 1,000) |",
        "| tokens per second | 12,346 (median of 99 intervals) |",
        "| MFU | 43.2% |",
        "| memory of the first process | 812 MB |",
        f"| weights read per decoded token, bfloat16 | {weights / 1000:.3g} kB |",
        f"| decoding token 64 on this machine, at best | {1e9 / (weights + state):,.0f} tokens/s, bound by memory |",
    ]


def test_costs_are_figures_to_compare_fits_by() -> None:
    figures = costs(shape(), found())
    assert figures["parameters"] == sum(weight.numel() for weight in decoder().parameters())
    assert f"{figures['decode_tokens_per_second_at_most']:,.0f} tokens/s" in summary(story(), shape(), found())
    assert costs(shape(), None) == {**figures, "decode_tokens_per_second_at_most": None}


def test_a_summary_says_what_is_not_known() -> None:
    bare = summary(Story("finetune", 3, 3, 100), shape())
    for line in (
        "| training loss | not logged |",
        "| validation | none |",
        "| tokens per second | not logged |",
        "| MFU | not known: no ceiling of this machine |",
        "| memory of the first process | not logged |",
        "| decoding token 64 on this machine, at best | not known: `python pipelines/ceilings.py` measures how fast "
        "this machine reads |",
    ):
        assert line in bare.splitlines()


def test_a_summary_of_a_fit_that_stopped_early_and_was_resumed_says_so() -> None:
    told = replace(story(), planned_steps=5000, validated_at_step=700, resumed_at_step=300)
    paragraph = summary(told, shape()).splitlines()[0]
    assert paragraph.endswith(
        "It stopped before step 5,000, as validation did not get better any more. The weights kept are those of step "
        "700, the best there were. It went on from step 300; speed and memory are since then."
    )
