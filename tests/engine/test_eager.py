from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Dtype, Parallel, Request, Token
from hasten.engine.eager import Eager, EagerSession
from hasten.errors import UserError
from hasten.model.cost import Cost, cost_of
from hasten.model.decoder import Decoder
from tests.tiny import decoder, lstm, lstm_shape, shape, write_variant

PROMPT = (0, 5, 17, 60)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return decoder(spread=0.3)


@pytest.fixture(scope="module")
def variant(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return write_variant(tmp_path_factory.mktemp("eager") / "baseline", model)


def load(variant: Variant, **options: Any) -> EagerSession:
    return Eager(**{"threads": 1, "max_context": 32, **options}).load(variant, Path("unused"))


def greedy(model: Decoder, prompt: tuple[int, ...], count: int) -> list[int]:
    """Without a cache: the whole sequence again for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_tokens_are_the_greedy_continuation_one_request_after_another(model: Decoder, variant: Variant) -> None:
    session = load(variant)
    requests = [Request(7, PROMPT, 10), Request(3, (9,), 6), Request(8, PROMPT, 10)]
    tokens = list(session.generate(requests))
    made = {request.id: [token.id for token in tokens if token.request == request.id] for request in requests}
    assert made == {request.id: greedy(model, request.prompt, request.max_tokens) for request in requests}
    assert len(set(made[7])) > 2


def test_each_token_says_when_it_arrived_since_its_request_was_sent(variant: Variant) -> None:
    tokens = list(load(variant).submit(Request(1, PROMPT, 5)))
    seconds = [token.seconds for token in tokens]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] < 5


def test_generation_ends_with_the_stop_token_which_is_yielded(model: Decoder, variant: Variant) -> None:
    expected = greedy(model, PROMPT, 10)
    stop = expected[3]
    tokens = [token.id for token in load(variant).submit(Request(1, PROMPT, 10, frozenset([stop, 101])))]
    assert tokens == expected[: expected.index(stop) + 1]
    without = [token.id for token in load(variant).submit(Request(1, PROMPT, 10))]
    assert len(without) == 10  # nothing stops it, whatever the checkpoint calls its end


def test_closing_the_iterator_cancels_and_leaves_the_session_usable(model: Decoder, variant: Variant) -> None:
    session = load(variant)
    running = session.submit(Request(1, PROMPT, 20))
    assert isinstance(next(running), Token)
    running.close()  # type: ignore[attr-defined]
    assert [token.id for token in session.submit(Request(2, (9,), 4))] == greedy(model, (9,), 4)


def test_prompt_and_answer_must_fit_the_context_and_exactly_fill_it(variant: Variant) -> None:
    session = load(variant, max_context=8)
    assert len(list(session.submit(Request(1, PROMPT, 4)))) == 4
    with pytest.raises(UserError, match=r"prompt \(4\) and max_tokens \(5\) must fit max_context \(8\)"):
        session.submit(Request(1, PROMPT, 5))  # refused at once, not when the first token is asked for


def test_an_empty_prompt_or_no_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="request 4: the prompt must hold at least one token"):
        Request(4, (), 1)
    with pytest.raises(UserError, match="request 4: max_tokens must be at least 1, got 0"):
        Request(4, (1,), 0)


def test_logits_that_are_not_finite_are_an_error_not_an_answer(variant: Variant) -> None:
    session = load(variant)
    with torch.no_grad():
        session.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="request 1: the logits are not finite"):
        list(session.submit(Request(1, PROMPT, 3)))


@pytest.mark.parametrize("weights", [Dtype.auto, Dtype.float32, Dtype.float16, Dtype.bfloat16])
@pytest.mark.parametrize("kv_cache", [Dtype.auto, Dtype.float32, Dtype.float16, Dtype.bfloat16])
def test_every_precision_generates_and_costs_the_bytes_it_says(
    variant: Variant, weights: Dtype, kv_cache: Dtype
) -> None:
    engine = Eager(threads=1, max_context=32, weight_dtype=weights, kv_cache_dtype=kv_cache)
    session = engine.load(variant, Path("unused"))
    assert len(list(session.submit(Request(1, PROMPT, 6)))) == 6
    used = Dtype.float32 if weights is Dtype.auto else weights
    cached = used if kv_cache is Dtype.auto else kv_cache
    size = {Dtype.float32: 4, Dtype.float16: 2, Dtype.bfloat16: 2}
    cost = Cost(shape())
    assert session.kernel == used.name
    assert session.weight_bytes_per_token == cost.parameters_per_token * size[used]
    assert session.memory() == {"weights": cost.parameters * size[used], "kv_cache": cost.kv_bytes(32, size[cached])}
    assert session.kv_bytes_per_position == cost.kv_bytes(1, size[cached])
    assert session.arithmetic == used.name
    assert session.load_seconds > 0
    assert session.compile_seconds == 0


def test_a_quantised_variant_is_dequantised_and_says_so(variant: Variant, tmp_path: Path) -> None:
    quantised, _ = make_variant(Rtn(bits=8), variant, None, name="int8", target=tmp_path / "int8", seed=0)
    engine = Eager(threads=1)
    support = engine.supports(quantised)
    assert support
    assert (support.native, support.native_format) == (False, "float32 (dequantised)")  # never a candidate for speed
    assert engine.load(quantised, tmp_path).kernel == "float32 (dequantised)"
    assert engine.supports(variant).native


def test_an_lstm_carries_its_state_from_token_to_token(tmp_path: Path) -> None:
    network = lstm()
    session = load(write_variant(tmp_path / "baseline", network))
    requests = [Request(7, PROMPT, 10), Request(3, (9,), 6), Request(8, PROMPT, 10)]
    made = {request.id: [token.id for token in session.submit(request)] for request in requests}
    for request in requests:
        ids, prompt = list(request.prompt), torch.tensor([len(request.prompt)])
        with torch.inference_mode():  # the whole sequence again for every token
            for _ in range(request.max_tokens):
                ids.append(int(network.lm_head(network.hidden(torch.tensor([ids]), prompt)[0, -1]).argmax()))
        assert made[request.id] == ids[len(request.prompt) :]
    assert len(set(made[7])) > 2
    cost = cost_of(lstm_shape())
    assert session.memory() == {"weights": cost.parameters * 4, "kv_cache": cost.kv_bytes(1, 4)}
    assert session.weight_bytes_per_token == cost.parameters_per_token * 4
    assert session.kv_bytes_per_position == 0  # a longer text costs it nothing


@pytest.mark.parametrize("weights", [Dtype.float16, Dtype.bfloat16])
def test_an_lstm_generates_in_low_precision(tmp_path: Path, weights: Dtype) -> None:
    variant = write_variant(tmp_path / "baseline", lstm(spread=0.2))
    session = load(variant, weight_dtype=weights)
    assert len(list(session.submit(Request(1, PROMPT, 6)))) == 6
    assert (session.kernel, Eager(weight_dtype=weights).supports(variant).native) == (weights.name, True)


def test_another_architecture_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    support = Eager().supports(Variant(tmp_path))
    assert not support
    assert str(support.reason).startswith("config.json: model_type must be one of llama, mistral,")
    assert str(support.reason).endswith("got 'gpt2'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": -1}, "threads must be 0 (all cores) to 4096, got -1"),
        ({"threads": 5000}, "threads must be 0 (all cores) to 4096, got 5000"),
        ({"max_context": 1}, "max_context must be at least 2, got 1"),
        ({"parallel": Parallel.tensor}, "parallel must be none for engine eager, got tensor"),
        ({"devices": []}, "engine.devices"),
        ({"devices": ["cpu", "cpu"]}, "engine.devices"),
        ({"devices": ["tpu"]}, "engine.devices must be one of [cpu], [cuda:0], got ['tpu']"),
        ({"devices": ["cpux"]}, "engine.devices must be one of [cpu], [cuda:0], got ['cpux']"),
        ({"activation_dtype": Dtype.bfloat16}, "engine.activation_dtype must be auto or float32"),
    ],
)
def test_options_that_eager_cannot_honour_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Eager(**options)
    assert words in str(error.value)


def test_activations_may_be_named_when_they_are_the_weights_own() -> None:
    engine = Eager(weight_dtype=Dtype.bfloat16, activation_dtype=Dtype.bfloat16)
    assert engine.kv_cache is Dtype.bfloat16
    assert engine.describe()["activation_dtype"] == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test must lack")
def test_a_device_that_is_not_there_is_one_sentence(variant: Variant) -> None:
    with pytest.raises(UserError, match=r"engine\.devices asks for cuda:0, this machine has no CUDA device"):
        load(variant, devices=["cuda:0"])


def test_the_engine_runs_on_the_threads_it_is_given_and_records_them(variant: Variant) -> None:
    load(variant, threads=2)
    assert torch.get_num_threads() == 2
    load(variant, threads=1)
    assert torch.get_num_threads() == 1
    assert Eager(threads=3).describe()["threads"] == 3
    assert Eager().describe()["threads"] >= 1  # all cores, as a number


def test_a_closed_session_holds_no_model(variant: Variant) -> None:
    session = load(variant)
    session.close()
    with pytest.raises(AttributeError):
        list(session.submit(Request(1, PROMPT, 1)))
