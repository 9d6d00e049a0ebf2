"""A draft that writes ahead of the native engine: whatever it guesses, the answers stay the same to the token."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hasten.artifacts import Variant, write_json
from hasten.engine.base import Dtype, Request
from hasten.engine.native import Native, NativeSession
from hasten.engine.native import build as kernels
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.huggingface import load_network
from tests.engine import llama
from tests.engine.llama import ids, prompt
from tests.engine.test_native import EXACT, quantised

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="needs a C++ compiler")
ROUNDED = {"activation_dtype": Dtype.auto, "kv_cache_dtype": Dtype.float16}
FORMATS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "float32": (None, {}),
    "bfloat16": (None, {**ROUNDED, "weight_dtype": Dtype.bfloat16}),
    "int8": (8, ROUNDED),
    "int4": (4, ROUNDED),
}
DRAWN: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
SIZES = [(1, 40), (9, 60), (30, 2), (61, 33), (4, 1), (100, 40), (17, 60), (2, 25)]  # tokens of prompt and completion
REQUESTS = [
    Request(i, prompt(length, i), most, seed=i, **(DRAWN if i % 2 else {})) for i, (length, most) in enumerate(SIZES)
]


def shallow_tensors() -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a model whose second block does little, and of its first block alone."""
    tensors = llama.random_tensors(llama.shape())
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"] *= 0.1
    return tensors, {name: value for name, value in tensors.items() if "layers.1." not in name}


@dataclass
class Family:
    """A variant with drafts beside it: `shallow`, which is much like it, and `strange`, which is not."""

    variant: Variant
    cache: Path
    options: dict[str, Any]

    def session(self, **options: Any) -> closing[NativeSession]:
        return closing(Native(**{**EXACT, "threads": 1, **self.options, **options}).load(self.variant, self.cache))

    def answers(self, requests: list[Request], **options: Any) -> tuple[list[list[int]], tuple[int, int]]:
        """Of requests that are sent at once; how much was guessed of them, and right."""
        with self.session(**options) as session:
            streams = [session.submit(request) for request in requests]
            return [ids(stream) for stream in streams], session.guessed()

    @cached_property
    def plain(self) -> list[list[int]]:
        """What the requests are answered one by one, where nothing guesses."""
        found, guessed = self.answers(REQUESTS)
        assert guessed == (0, 0)
        return found


@pytest.fixture(scope="module", params=FORMATS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    whole, first = shallow_tensors()
    one = llama.shape(layers=1)
    bits, options = FORMATS[request.param]
    for name, config, tensors in (
        ("whole", llama.shape(), whole),
        ("shallow", one, first),
        ("strange", one, llama.random_tensors(one, seed=1)),
    ):
        made = llama.variant(folder / (f"{name}-float" if bits else name), config, tensors)
        if bits:
            quantised(made, bits, 32, name)
    return Family(Variant(folder / "whole"), cache, options)


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("guesses", [1, 5])
def test_a_draft_changes_how_long_it_takes_and_not_a_token(family: Family, guesses: int, slots: int) -> None:
    rates = []
    for draft in ("whole", "shallow", "strange"):
        found, (guessed, right) = family.answers(REQUESTS, draft=draft, guesses=guesses, slots=slots)
        assert found == family.plain
        assert guessed > 100
        rates.append(right / guessed)
    itself, shallow, strange = rates
    assert itself == 1  # greedy or drawn: it draws by the same chance
    assert strange < 0.1 < shallow < 1


@pytest.mark.parametrize("family", ["float32"], indirect=True)
@pytest.mark.parametrize("guesses", [1, 4])
def test_it_guesses_what_the_drafts_network_would_write(family: Family, guesses: int) -> None:
    """Without a cache and after the accepted tokens alone: nothing that was refused is remembered."""
    network = load_network(Variant(family.variant.path.with_name("shallow"))).eval()
    requests = [request for request in REQUESTS if request.temperature == 0]
    guessed = right = 0
    for request in requests:
        text, length = [*request.prompt, *family.plain[request.id]], len(request.prompt) + 1
        while length < len(text):
            ahead = text[:length]
            for _ in range(min(guesses, len(text) - length - 1)):
                with torch.inference_mode():
                    ahead.append(int(network(torch.tensor([ahead]))[0, -1].argmax()))
            pairs = zip(ahead[length:], text[length:], strict=False)
            agreed = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            guessed, right, length = guessed + len(ahead) - length, right + agreed, length + agreed + 1
    assert 0 < right < guessed
    expected = [family.plain[request.id] for request in requests]
    assert family.answers(requests, draft="shallow", guesses=guesses, slots=2) == (expected, (guessed, right))


@pytest.mark.parametrize("family", ["float32"], indirect=True)
def test_a_draft_of_few_bits_guesses_too(family: Family) -> None:
    """Any variant of the same vocabulary may: here integers for a variant in float."""
    quantised(Variant(family.variant.path.with_name("shallow")), 8, 64, "shallow-int8")
    found, (guessed, right) = family.answers(REQUESTS, draft="shallow-int8", guesses=3, slots=2)
    assert found == family.plain
    assert 0.3 < right / guessed < 1


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(1, 6),
    more=st.integers(1, 40),
    draft=st.sampled_from(["shallow", "strange"]),
    order=st.permutations(REQUESTS),
    cancelled=st.sets(st.integers(0, 7), max_size=4),
    data=st.data(),
)
def test_passes_may_be_narrow_and_requests_be_cancelled(
    family: Family, slots: int, more: int, draft: str, order: list[Request], cancelled: set[int], data: st.DataObject
) -> None:
    """Prompts take several passes of the draft, passes have no room for all guesses, slots change hands midway."""
    micro_batch = slots + more
    guesses = data.draw(st.integers(1, min(9, micro_batch - 1)))
    with family.session(draft=draft, guesses=guesses, slots=slots, micro_batch=micro_batch) as session:
        streams = {request.id: session.submit(request) for request in order}
        for number in cancelled:
            next(streams[number])
            streams.pop(number).close()
        assert {number: ids(stream) for number, stream in streams.items()} == {
            number: answer for number, answer in enumerate(family.plain) if number not in cancelled
        }


@pytest.mark.parametrize("slots", [1, 4])
def test_a_context_may_be_filled_to_its_end(family: Family, slots: int) -> None:
    """Nothing is guessed beyond it."""
    requests = [Request(i, prompt(256 - most, i), most) for i, most in enumerate((1, 2, 3, 20, 200))]
    expected, _ = family.answers(requests)
    for draft in ("whole", "strange"):
        assert family.answers(requests, draft=draft, guesses=7, slots=slots)[0] == expected
    assert [len(answer) for answer in expected] == [1, 2, 3, 20, 200]


def test_a_stop_among_right_guesses_is_the_last_token(family: Family) -> None:
    free = family.plain[0]
    stop = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    request = replace(REQUESTS[0], stop=frozenset({stop}))
    found, _ = family.answers([request], draft="whole", guesses=9, threads=2)
    assert found == [free[: free.index(stop) + 1]]


def test_a_draft_that_computes_no_numbers_guesses_nothing(tmp_path: Path, cache: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    tensors = llama.random_tensors(llama.shape())
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    llama.variant(tmp_path / "broken", llama.shape(), tensors)
    family = Family(variant, cache, {})
    assert family.answers(REQUESTS, draft="broken", guesses=3) == (family.plain, (0, 0))


@pytest.mark.parametrize("family", ["float32"], indirect=True)
def test_the_draft_counts_as_memory_and_not_as_what_a_token_reads(family: Family) -> None:
    one = llama.shape(layers=1)
    with family.session() as alone, family.session(draft="strange", guesses=2) as both:
        before, after = alone.memory(), both.memory()
        assert {name: (after[name] or 0) - (before[name] or 0) for name in after} == {
            "weights": 4 * sum(v.numel() for v in llama.random_tensors(one).values() if v.dim() == 2),
            "kv_cache": 2 * one.kv_heads * one.head_width * 256 * 4,
        }
        for fact in ("weight_bytes_per_token", "kv_bytes_per_position", "kernel", "arithmetic"):
            assert getattr(both, fact) == getattr(alone, fact)


def test_the_engine_says_who_guesses(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    drafted = Native(draft="shallow", guesses=3)
    assert (drafted.describe()["draft"], drafted.describe()["guesses"]) == ("shallow", 3)
    assert drafted.draft_of(variant) == Variant(tmp_path / "shallow")
    assert Native().draft_of(variant) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "engine.draft must name a variant beside v, got 'd'"),
        (llama.shape(vocab_size=304), "engine.draft must have a vocabulary of 320, got 'd' with 304"),
        (llama.shape(context=128), "engine.draft must hold 256 tokens, got 'd' with a context of 128"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(
    tmp_path: Path, cache: Path, config: ModelConfig | None, words: str
) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    if config:
        llama.variant(tmp_path / "d", config)
    engine = Native(**EXACT, draft="d", guesses=1)
    assert engine.supports(variant).reason == words
    with pytest.raises(UserError, match=f"native cannot run v: {words}"):
        engine.load(variant, cache)


def test_a_draft_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    variant, draft = (llama.variant(tmp_path / name, llama.shape()) for name in "vd")
    engine = Native(draft="d", guesses=1)
    assert engine.supports(variant)
    file = draft.path / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    assert engine.supports(variant).reason == "engine.draft must have the tokenizer of v, got 'd' with another"
    file.unlink()
    assert engine.supports(variant).reason == "engine.draft must have the tokenizer of v, got 'd' with another"


def test_a_draft_that_the_kernels_cannot_run_is_refused(tmp_path: Path) -> None:
    variant, draft = (llama.variant(tmp_path / name, llama.shape()) for name in "vd")
    draft.config["model_type"] = "mamba"
    write_json(draft.path / "config.json", draft.config)
    reason = str(Native(draft="d", guesses=1).supports(variant).reason)
    assert reason.startswith("engine.draft must name a variant that native runs, got 'd': ")
