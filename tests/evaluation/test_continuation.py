from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from hasten.artifacts import Tokens, Variant
from hasten.engine.base import Engine, Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.evaluation import continuation as module
from hasten.evaluation.continuation import (
    Continuation,
    divergence,
    generate,
    greedy,
    judge,
    prompts,
    repetition_rate,
    save,
    summary,
)
from hasten.model.huggingface import load_network
from hasten.tokenizer.base import Tokenizer
from tests.engine import llama
from tests.evaluation.texts import CHINESE, ENGLISH, bilingual, write_tokens
from tests.fakes import FakeSession
from tests.tiny import lstm, write_variant

OPTIONS = Continuation(prompts_per_language=3, prompt_tokens=8, output_tokens=12)
CACHE = Path("unused")


@dataclass
class Asked:
    """The fields of a job that a continuation reads."""

    tokens: Path
    tokenizer: Path
    baseline: Path | None
    engine: Engine
    variant: Path
    continuation: Continuation | None = field(default_factory=lambda: OPTIONS)
    seed: int = 0


def run(session: Any, job: Any) -> list[dict[str, Any]]:
    """Both halves: generate in one process, judge in another."""
    return judge(generate(session, job), job.baseline, job.tokenizer)


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return llama.variant(tmp_path_factory.mktemp("float") / "v", llama.shape(context=64))


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("held-out") / "tokens", tokenizer, bilingual())


@pytest.fixture
def job(variant: Variant, tokens: Tokens) -> Any:
    return Asked(tokens.path, variant.path, variant.path, Eager(threads=1, max_context=64), variant.path)


def alone(model: torch.nn.Module, prompt: tuple[int, ...], count: int) -> list[int]:
    """Without cache and batch: the whole sequence again for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_prompts_are_slices_of_documents_of_their_language_without_the_tokens_around_them(
    tokens: Tokens, tokenizer: Tokenizer
) -> None:
    drawn = prompts(tokens, OPTIONS, 0)
    assert [prompt.language for prompt in drawn] == ["en"] * 3 + ["zh"] * 3
    assert len({prompt.id for prompt in drawn}) == 6
    for prompt in drawn:
        texts = ENGLISH if prompt.language == "en" else CHINESE
        bodies = [tuple(tokenizer.encode(text)) for text in texts]
        places = (body[i : i + 8] for body in bodies for i in range(len(body)))
        assert prompt.tokens in places
        assert len(prompt.tokens) == 8


def test_the_seed_decides_the_prompts_and_nothing_else_does(tokens: Tokens) -> None:
    assert prompts(tokens, OPTIONS, 0) == prompts(tokens, OPTIONS, 0)
    assert prompts(tokens, OPTIONS, 0) != prompts(tokens, OPTIONS, 1)
    fewer = prompts(tokens, Continuation(2, 8, 12), 0)
    assert [prompt for prompt in prompts(tokens, OPTIONS, 0) if prompt in fewer] == fewer


def test_documents_are_used_once_while_there_are_others(tokens: Tokens) -> None:
    documents = [prompt.id.split("-")[2] for prompt in prompts(tokens, Continuation(2, 8, 12), 3)]
    assert len(set(documents)) == 4


def test_a_language_of_short_documents_gives_shorter_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", tokenizer, [*bilingual(), ("en", "y")][4:])
    lengths = {prompt.language: len(prompt.tokens) for prompt in prompts(tokens, OPTIONS, 0)}
    assert lengths == {"en": 1, "zh": 8}


def test_an_empty_split_has_nothing_to_continue(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", tokenizer, [("en", [])])
    with pytest.raises(UserError, match="must hold at least one document to continue, got none"):
        prompts(tokens, OPTIONS, 0)


def test_batches_with_a_cache_continue_as_each_sequence_alone(variant: Variant) -> None:
    model = load_network(variant).eval()
    threads = torch.get_num_threads()
    sequences = [(5, 6, 7), (9,), (30, 40, 50), (80,), (3, 4, 5)]
    assert greedy(model, sequences, 20) == [alone(model, ids, 20) for ids in sequences]
    assert torch.get_num_threads() == threads


def test_a_baseline_that_overflows_is_an_error(variant: Variant) -> None:
    model = load_network(variant).eval()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the baseline's logits are not finite"):
        greedy(model, [(5, 6)], 3)


def test_the_baseline_through_its_own_engine_never_diverges(job: Any, variant: Variant) -> None:
    session = job.engine.load(variant, CACHE)
    rows = run(session, job)
    assert len(rows) == 6
    for row in rows:
        assert (row["tokens_until_divergence"], row["diverged"]) == (12, False)
        assert len(row["output_ids"]) == 12
        assert row["output"] == row["reference"]
        assert (row["bits"], row["bytes"]) == (row["reference_bits"], row["reference_bytes"])
    whole = summary(rows)
    assert whole is not None
    assert whole["tokens_until_divergence_p50"] == 12
    assert whole["diverged_share"] == 0
    assert whole["bits_per_byte"] == whole["reference"]["bits_per_byte"]


def test_bits_are_the_outputs_given_its_prompt_under_the_baseline(
    variant: Variant, tokens: Tokens, tokenizer: Tokenizer
) -> None:
    model = load_network(variant).eval()
    drawn = prompts(tokens, OPTIONS, 0)[:2]
    outputs = [[5, 6, 300, 7, 90, 91, 92, 93], [60, 61, 62, 63, 64, 65, 66, 67]]
    given = [
        {"language": prompt.language, "prompt_id": prompt.id, "prompt_ids": list(prompt.tokens), "output_ids": output}
        for prompt, output in zip(drawn, outputs, strict=True)
    ]
    rows = judge(given, variant.path, variant.path)
    for prompt, output, row in zip(drawn, outputs, rows, strict=True):
        ids = [*prompt.tokens, *output]
        with torch.inference_mode():
            chances = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        bits = -sum(float(chances[i - 1, ids[i]]) for i in range(len(prompt.tokens), len(ids))) / math.log(2)
        assert row["bits"] == pytest.approx(bits, rel=1e-5)
        assert row["prompt"] == tokenizer.decode(prompt.tokens)
    assert rows[0]["bytes"] == sum(len(tokenizer.backend.id_to_token(id_) or "") for id_ in outputs[0])


def test_an_lstm_is_judged_with_the_prompt_in_its_encoder(tmp_path: Path) -> None:
    model = lstm()
    checkpoint = write_variant(tmp_path / "baseline", model)
    given = [
        {"language": "en", "prompt_id": str(number), "prompt_ids": prompt, "output_ids": [8, 9, 50, 51]}
        for number, prompt in enumerate(([5, 6, 7], [60, 61, 62, 63, 64]))
    ]
    rows = judge(given, checkpoint.path, checkpoint.path)
    session = Eager(threads=1).load(checkpoint, CACHE)
    for asked, row in zip(given, rows, strict=True):
        prompt, output = asked["prompt_ids"], asked["output_ids"]
        with torch.inference_mode():
            states = model.hidden(torch.tensor([[*prompt, *output]]), torch.tensor([len(prompt)]))
            chances = model.lm_head(states)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        bits = -sum(float(chances[i, id_]) for i, id_ in enumerate(output)) / math.log(2)
        assert row["bits"] == pytest.approx(bits, rel=1e-5)
        asked["output_ids"] = [token.id for token in session.submit(Request(0, tuple(prompt), 4))]
    assert [row["diverged"] for row in judge(given, checkpoint.path, checkpoint.path)] == [False, False]


def test_generating_and_judging_may_be_apart(job: Any, variant: Variant) -> None:
    session = job.engine.load(variant, CACHE)
    raw = generate(session, job)
    assert {key for one in raw for key in one} == {"language", "prompt_id", "prompt_ids", "output_ids"}
    assert judge(json.loads(json.dumps(raw)), variant.path, variant.path) == run(session, job)
    assert judge([], variant.path, variant.path) == []


def test_another_variant_diverges_where_the_tokens_first_differ(job: Any, variant: Variant, tmp_path: Path) -> None:
    other = llama.variant(tmp_path / "w", llama.shape(context=64), llama.random_tensors(llama.shape(), seed=4))
    rows = run(job.engine.load(other, CACHE), job)
    model = load_network(variant).eval()
    for row, prompt in zip(rows, prompts(Tokens(job.tokens), OPTIONS, 0), strict=True):
        same = alone(model, prompt.tokens, 12)
        expected = next((i for i in range(12) if same[i] != row["output_ids"][i]), 12)
        assert (row["tokens_until_divergence"], row["diverged"]) == (expected, expected < 12)
    assert any(row["diverged"] for row in rows)
    assert summary(rows)["bits_per_byte"] > summary(rows)["reference"]["bits_per_byte"]  # type: ignore[index]


def test_requests_are_verified_ignore_the_end_of_text_and_are_the_same_for_every_trial(job: Any) -> None:
    session = FakeSession(reply=lambda request: [1] * request.max_tokens)
    rows = run(session, job)
    assert session.requests == [
        Request(i, prompt.tokens, 12, frozenset(), verify=True)
        for i, prompt in enumerate(prompts(Tokens(job.tokens), OPTIONS, 0))
    ]
    assert [row["output_ids"] for row in rows] == [[1] * 12] * 6  # end of text is a token like others
    assert {(row["output"], row["bytes"]) for row in rows} == {("", 0)}
    whole = summary(rows)
    assert whole is not None
    assert whole["bits_per_byte"] is None
    assert whole["why"] == {"bits_per_byte": "the outputs spell no byte"}
    assert json.dumps(whole, allow_nan=False)


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [([5] * 11, "ended request 0 after 11 of 12 tokens"), ([5] * 13, "went on"), ([999] * 12, "token id 999")],
)
def test_an_engine_that_breaks_the_rules_is_caught(job: Any, reply: list[int], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        run(FakeSession(reply=lambda request: reply), job)


def test_without_options_or_prompts_nothing_is_generated(job: Any) -> None:
    session = FakeSession()
    for options in (None, Continuation(prompts_per_language=0)):
        job.continuation = options
        assert run(session, job) == []
    assert session.requests == []


def test_what_does_not_fit_or_lacks_a_baseline_is_refused_before_anything_is_generated(job: Any) -> None:
    session = FakeSession()
    job.continuation = Continuation(3, 60, 12)
    with pytest.raises(UserError, match=r"must fit max_context of engine eager \(64\), got 60 \+ 12"):
        run(session, job)
    job.continuation, job.baseline = OPTIONS, None
    with pytest.raises(UserError, match="needs the float baseline"):
        run(session, job)
    assert session.requests == []


@pytest.mark.parametrize(
    ("ids", "rate"), [([1, 2, 3, 4], 0), ([7] * 8, 0.8), ([1, 2, 1, 2, 1, 2, 1], 0.5), (list(range(128)), 0)]
)
def test_repetition_is_the_share_of_four_grams_seen_before(ids: list[int], rate: float) -> None:
    assert repetition_rate(ids) == pytest.approx(rate)


def test_divergence_counts_the_tokens_in_common() -> None:
    assert divergence([1, 2, 3], [1, 2, 3]) == 3
    assert divergence([1, 2, 3], [1, 9, 3]) == 1
    assert divergence([1, 2, 3], [0, 2, 3]) == 0


def row(language: str, **changes: Any) -> dict[str, Any]:
    """A row of a continuation."""
    return {
        "language": language,
        "prompt_id": "p",
        "prompt": "a",
        "output": "b c",
        "output_ids": [5, 6, 7, 8],
        "bits": 10.0,
        "bytes": 5,
        "repetition_rate": 0.5,
        "tokens_until_divergence": 3,
        "diverged": True,
        "reference": "b d",
        "reference_bits": 6.0,
        "reference_bytes": 6,
        "reference_repetition_rate": 0.25,
    } | changes


def test_a_summary_has_figures_pooled_per_language_and_of_the_baseline() -> None:
    rows = [row("en") for _ in range(6)]
    rows += [row("zh", bits=1.0, bytes=1, tokens_until_divergence=4, diverged=False) for _ in range(2)]
    whole = summary(rows)
    assert whole is not None
    assert (whole["n"], whole["output_tokens"]) == (8, 4)
    assert whole["bits_per_byte"] == pytest.approx(62 / 32)
    assert whole["repetition_rate"] == 0.5
    assert whole["tokens_until_divergence_p50"] == 3
    low, high = whole["ci95"]["tokens_until_divergence_p50"]
    assert low <= 3 <= high
    assert whole["diverged_share"] == 0.75
    assert whole["reference"] == {"bits_per_byte": 1.0, "repetition_rate": 0.25}
    assert whole["languages"]["en"]["bits_per_byte"] == 2
    chinese = whole["languages"]["zh"]
    assert (chinese["n"], chinese["bits_per_byte"], chinese["diverged_share"]) == (2, 1, 0)
    assert chinese["tokens_until_divergence_p50"] is None  # two prompts do not bound a median
    assert "needs at least" in chinese["why"]["tokens_until_divergence_p50"]
    assert summary([]) is None


def test_continuations_survive_the_disk(tmp_path: Path) -> None:
    rows = [row("en"), row("zh", output="", reference="今天", bits=0.1)]
    save(rows, tmp_path / "c.parquet")
    assert parquet.read_table(tmp_path / "c.parquet").to_pylist() == rows
    save([], tmp_path / "c.parquet")
    empty = parquet.read_table(tmp_path / "c.parquet")
    assert (empty.num_rows, empty.column_names) == (0, list(rows[0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts_per_language": -1}, "prompts_per_language must be at least 0, got -1"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"output_tokens": 3}, "output_tokens must be at least 4, got 3"),
    ],
)
def test_options_are_checked_at_the_door(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Continuation(**options)


def test_a_large_baseline_keeps_its_threads(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL_MODEL", 0)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    greedy(load_network(variant).eval(), [(5,)], 4)
    assert set(asked) == {torch.get_num_threads()}
