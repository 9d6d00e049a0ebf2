"""What every engine has to do, whatever it is made of: one suite, run against each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from scipy.stats import chisquare

from hasten.artifacts import Variant
from hasten.engine.base import Request, Session
from hasten.engine.sampling import probabilities
from hasten.errors import UserError
from hasten.model.network import Network
from tests.engine import llama
from tests.engine.engines import BATCHING, ENGINES, engine, opened
from tests.engine.llama import far_from_best, ids, prompt
from tests.engine.shelf import Shelf
from tests.tiny import lstm, write_variant

NEAR_TIE = 0.01  # two logits closer than this may change places: sums are in another order
SHARED = [(name, ENGINES[name].family, {"slots": 16}) for name in BATCHING]
SHARED += [(name, "gemma3-short", {"slots": 5, "micro_batch": 24}) for name in BATCHING if name != "vllm"]
SHARED += [("vllm", "gemma3-short", {"slots": 5})]
SHARED += [("onnxruntime", "llama", {"slots": 1, "micro_batch": 24})]
"""Engines, families and options with which requests share passes."""


Logits = Callable[[tuple[int, ...]], torch.Tensor]
CORRUPT = [
    (None, "model.safetensors lacks model.norm.weight"),
    (torch.ones(3), r"model.norm.weight must .*\(64,\) by config.json, got \(3,\)"),
    (torch.full((64,), torch.nan), "model.norm.weight holds NaN or infinite values"),
]
"""What the final norm may be, and what is said."""


@pytest.fixture(scope="module", params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def variant(shelf: Shelf, name: str) -> Variant:
    return shelf.variant(ENGINES[name].family)


@pytest.fixture(scope="module")
def network(shelf: Shelf, variant: Variant) -> Network:
    return shelf.network(variant)


@pytest.fixture(scope="module")
def session(name: str, variant: Variant, cache: Path) -> Iterator[Session]:
    with opened(name, variant, cache) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def near_tie() -> float:
    return NEAR_TIE


@pytest.fixture(scope="module")
def logits(network: Network) -> Logits:
    """Behind a prompt."""

    def behind(asked: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = network(torch.tensor([asked]))[0, -1]
        return found

    return behind


@pytest.mark.parametrize("length", [1, 2, 31, 200])
def test_greedy_answers_are_the_networks(network: Network, session: Session, near_tie: float, length: int) -> None:
    asked = prompt(length, length)
    found = ids(session.submit(Request(1, asked, 24)))
    assert far_from_best(network, asked, found) < near_tie


def test_every_token_comes_in_order_with_its_request_and_its_time(session: Session) -> None:
    tokens = list(session.generate([Request(7, prompt(9), 12), Request(3, prompt(4), 5)]))
    assert [token.request for token in tokens] == [7] * 12 + [3] * 5
    for number in (7, 3):
        times = [token.seconds for token in tokens if token.request == number]
        assert times == sorted(times)
        assert 0 < times[0] < times[-1] < 20


def test_a_stop_is_yielded_last_and_without_one_the_length_is_exact(session: Session) -> None:
    free = ids(session.submit(Request(0, prompt(5), 40)))
    assert len(free) == 40
    stop = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    assert ids(session.submit(Request(1, prompt(5), 40, frozenset({stop, 319})))) == free[: free.index(stop) + 1]
    assert ids(session.submit(Request(2, prompt(5), 40, frozenset({319} - set(free))))) == free


def test_a_request_may_fill_the_context_and_not_a_token_more(session: Session) -> None:
    assert len(ids(session.submit(Request(0, prompt(246), 10)))) == 10
    for asked, most in ((prompt(246), 11), (prompt(400), 1)):
        words = rf"prompt \({len(asked)}\) and max_tokens \({most}\) must fit max_context \(256\)"
        with pytest.raises(UserError, match=words):
            session.submit(Request(0, asked, most))
    with pytest.raises(UserError, match="token ids must be 0 to 319, got 320"):
        session.submit(Request(0, (5, 320), 1))


def test_tokens_that_are_pieces_of_a_character_come_one_by_one(variant: Variant, session: Session) -> None:
    """The bytes of Chinese characters: an engine that speaks text would hold them back until one is whole."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(variant.path / "tokenizer.json"))
    asked = tuple(tokenizer.encode("漢字🙂").ids)
    assert len(asked) > 3  # no piece is a whole character
    tokens = list(session.submit(Request(0, asked, 20)))
    assert len(tokens) == 20
    assert len({token.seconds for token in tokens}) == 20


def test_closing_a_stream_cancels_and_the_next_answer_is_right(session: Session) -> None:
    expected = ids(session.submit(Request(0, prompt(9), 8)))
    for drop in (False, True):
        stream: Any = session.submit(Request(1, prompt(4), 250))
        next(stream)
        if drop:
            del stream
            gc.collect()
        else:
            stream.close()
            assert list(stream) == []
        assert ids(session.submit(Request(2, prompt(9), 8))) == expected


@pytest.mark.parametrize(("name", "family", "options"), SHARED)
def test_sixty_four_at_once_get_the_answers_they_get_alone(
    shelf: Shelf, cache: Path, name: str, family: str, options: dict[str, int]
) -> None:
    """Of unequal lengths; where passes are narrow, prompts are cut, and requests move into the gaps of others."""
    variant = shelf.variant(family)
    requests = [Request(i, prompt(1 + 7 * i % 61, i), 5 + i % 20) for i in range(64)]
    with opened(name, variant, cache, threads=2, **options) as loaded:
        streams = [loaded.submit(request) for request in requests]
        answers = [list(stream) for stream in streams]
    for request, tokens in zip(requests, answers, strict=True):
        assert [token.request for token in tokens] == [request.id] * request.max_tokens
        assert far_from_best(shelf.network(variant), request.prompt, [token.id for token in tokens]) < NEAR_TIE
    starts, ends = zip(*((tokens[0].seconds, tokens[-1].seconds) for tokens in answers[:16]), strict=True)
    assert options["slots"] == 1 or any(starts[i + 1] < ends[i] for i in range(15))  # not one after the other


def test_what_was_closed_can_be_loaded_again(variant: Variant, cache: Path, name: str) -> None:
    """So much waits that no machine is done with it before it is told to stop: native has seconds of work."""
    answers = []
    most = [130 + 37 * i % 121 for i in range(100 if name == "vllm" else 4000)]  # so that two seldom end at once
    for _ in range(2):
        with opened(name, variant, cache, threads=2, **({"slots": 2} if name in BATCHING else {})) as loaded:
            answers.append(ids(loaded.submit(Request(0, prompt(9), 8))))
            if name in BATCHING:
                streams = [loaded.submit(Request(i, prompt(4), count)) for i, count in enumerate(most)]
                next(streams[0])
        if name not in BATCHING:
            continue
        lengths = [len(list(stream)) for stream in streams]
        assert lengths[-1] == 0  # what waited never began
        assert sum(lengths) < sum(most) / 2
        if "native" not in name:  # of which nothing can be read any more
            assert any(0 < length < count - 1 for length, count in zip(lengths, most, strict=True))  # cut off midway
        with pytest.raises(RuntimeError, match="closed"):
            loaded.submit(Request(2, prompt(4), 1))
        loaded.close()  # twice does no harm
    assert answers[0] == answers[1]


def test_two_hundred_requests_leave_no_memory_behind(session: Session) -> None:
    def ask(count: int) -> int:
        for stream in [session.submit(Request(i, prompt(20, i), 5)) for i in range(count)]:
            ids(stream)
        gc.collect()
        own = psutil.Process()
        return sum(process.memory_info().rss for process in (own, *own.children(recursive=True)))

    before = ask(40)
    assert ask(200) - before < 4 * 2**20


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(session: Session) -> None:
    asked = [Request(i, prompt(9), 20, temperature=1.5, top_p=0.95, seed=seed) for i, seed in enumerate((5, 5, 6))]
    first, again, other = (ids(session.submit(request)) for request in asked)
    assert first == again != other
    assert first != ids(session.submit(Request(3, prompt(9), 20)))  # nor is it the greedy answer


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_as_often_as_they_are_probable(
    logits: Logits, session: Session, temperature: float, top_p: float
) -> None:
    asked, draws = prompt(9), 400
    expected = probabilities(logits(asked), temperature, top_p)
    found = torch.zeros(len(expected))
    requests = [Request(seed, asked, 1, temperature=temperature, top_p=top_p, seed=seed) for seed in range(draws)]
    for stream in [session.submit(request) for request in requests]:
        found[ids(stream)[0]] += 1
    assert found[expected == 0].sum() <= draws * 0.01  # at the nucleus' edge, rounding decides
    common = expected * draws >= 5  # what chi-square asks for; the rest is one class
    pairs = [torch.cat([values[common], values[~common].sum()[None]]) for values in (found, expected * draws)]
    observed, wanted = (values[pairs[1] > 0].numpy() for values in pairs)
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or more, got -1.0"),
        ({"top_p": 0.0}, "top_p must be above 0, and at most 1, got 0.0"),
        ({"seed": -1}, r"seed must be 0 to 2\*\*32 - 1, got -1"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Request(0, (1,), 1, **changes)


@pytest.mark.parametrize("name", ["compiled", "eager", "native", "onnxruntime", "openvino", "transformers"])
def test_logits_that_are_not_finite_are_an_error(shelf: Shelf, cache: Path, name: str) -> None:
    with opened(name, shelf.broken(), cache) as session:
        for temperature in (0.0, 1.0):
            with pytest.raises(RuntimeError, match="request 3: the logits are not finite after 0 tokens"):
                list(session.submit(Request(3, prompt(4), 5, verify=True, temperature=temperature)))


@pytest.mark.parametrize("name", ["compiled", "native", "onnxruntime", "openvino", "transformers"])
def test_a_checkpoint_that_is_not_what_it_says_is_one_sentence(tmp_path: Path, cache: Path, name: str) -> None:
    for number, (norm, words) in enumerate(CORRUPT):
        broken = llama.rewrite(llama.variant(tmp_path / f"v{number}", llama.shape()), {"model.norm.weight": norm})
        with pytest.raises(UserError, match=words):
            engine(name).load(broken, cache)


@pytest.mark.parametrize("name", ENGINES)
def test_a_grid_that_does_not_exist_is_refused_not_raised(shelf: Shelf, tmp_path: Path, name: str) -> None:
    odd = llama.variant(tmp_path / "v", llama.shape())
    odd.manifest["grid"] = {"bits": 3, "group_size": 32, "symmetric": True}
    assert engine(name).reads(odd).reason == "bits must be one of [4, 8], got 3"


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "eager"])
def test_what_is_no_decoder_is_refused_with_its_name(tmp_path: Path, cache: Path, name: str) -> None:
    recurrent = write_variant(tmp_path / "recurrent", lstm())
    assert "got 'hasten_lstm'" in str(engine(name).reads(recurrent).reason)
    with pytest.raises(UserError, match="got 'hasten_lstm'"):
        engine(name).load(recurrent, cache)
