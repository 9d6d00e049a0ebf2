import gc
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import torch

from hasten.artifacts import Variant
from hasten.engine.base import Dtype, Request
from hasten.engine.llamacpp import FlashAttention, Llamacpp, LlamacppFlight, _body, arithmetic
from hasten.errors import UserError
from hasten.model.grid import Grid, floats
from hasten.model.huggingface import load_network
from tests.engine import llama

pytest.importorskip("xllamacpp")

EXACT = {"threads": 1, "weight_dtype": Dtype.float32, "kv_cache_dtype": Dtype.float32, "max_context": 256}


def session(variant, cache, **options):
    return closing(Llamacpp(**{**EXACT, **options}).load(variant, cache))


def ids(stream):
    return [token.id for token in stream]


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def greedy(model, prompt, continuation, tie=0.0):
    """What transformers would have chosen at each step of `continuation`, float32; within a `tie`, what was."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *continuation]])).logits[0, len(prompt) - 1 : -1]
        logits[range(len(continuation)), list(continuation)] += tie
    return logits.argmax(-1).tolist()


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    return llama.variant(tmp_path_factory.mktemp("variant") / "v", llama.shape())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(variant, cache):
    with session(variant, cache) as one:
        yield one


@pytest.mark.parametrize("attention", [FlashAttention.disabled, FlashAttention.enabled])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": False},
        {"heads": 4, "kv_heads": 4, "rope_theta": 500000.0},
        {"heads": 8, "kv_heads": 2, "head_size": 32, "norm_epsilon": 1e-6},
    ],
    ids=["grouped", "untied", "multi-head", "wide-heads"],
)
def test_float32_continuations_equal_transformers(tmp_path, changes, attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = llama.shape(**changes)
    variant = llama.variant(tmp_path / "v", config)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(variant.path)).eval()
    model.load_state_dict(llama.random_tensors(config), strict=not config.tied_head)
    model.save_pretrained(variant.path)  # the checkpoint as transformers itself writes it
    with session(Variant(variant.path), tmp_path, flash_attention=attention) as engine:
        tie = 0.005 if attention is FlashAttention.enabled else 0.0  # fused attention has a rounding of its own
        for seed, length in enumerate((1, 7, 40)):
            request = Request(seed, prompt(length, seed), 24)
            continuation = ids(engine.submit(request))
            assert continuation == greedy(model, request.prompt, continuation, tie)
            assert len(set(continuation)) > 4  # a model that repeats itself would prove little


@pytest.mark.parametrize("grid", [Grid(8, 32), Grid(8, 64), Grid(4, 32)], ids=str)
def test_a_quantised_variant_runs_its_own_integers(tmp_path, grid):
    config = llama.shape(tied_head=False)
    tensors = llama.quantised(llama.random_tensors(config), grid)
    variant = llama.variant(tmp_path / "q", config, tensors, grid)
    twin = load_network(llama.variant(tmp_path / "dequantised", config, floats(tensors, grid)))
    prompts = [prompt(12, seed) for seed in range(20)]
    with session(variant, tmp_path) as engine:
        assert engine.kernel.startswith({4: "Q4_0", 8: "Q8_0"}[grid.bits])
        firsts = [ids(engine.submit(Request(i, p, 1)))[0] for i, p in enumerate(prompts)]
    with torch.inference_mode():
        expected = [int(twin(torch.tensor([p]))[0, -1].argmax()) for p in prompts]
    # Activations are rounded to 8 bits on the way, so near ties may fall otherwise.
    assert sum(a == b for a, b in zip(firsts, expected, strict=True)) >= 17


def test_tokens_carry_their_request_and_rising_times(loaded):
    tokens = list(loaded.submit(Request(7, prompt(30), 16)))
    times = [token.seconds for token in tokens]
    assert {token.request for token in tokens} == {7}
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 10


def test_a_stop_id_is_yielded_last_and_without_one_the_length_is_exact(loaded):
    free = ids(loaded.submit(Request(0, prompt(5), 40)))
    assert len(free) == 40
    stop = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    end = free.index(stop) + 1
    assert ids(loaded.submit(Request(1, prompt(5), 40, frozenset({stop})))) == free[:end]
    unused = next(i for i in range(3, 300) if i not in free)
    assert ids(loaded.submit(Request(2, prompt(5), 40, frozenset({stop, unused})))) == free[:end]
    assert ids(loaded.submit(Request(3, prompt(5), 40, frozenset({unused})))) == free


def test_the_end_of_text_is_a_token_like_others_unless_it_is_asked_to_stop(tmp_path):
    config = llama.shape(tied_head=False)
    tensors = {name: torch.zeros_like(value) for name, value in llama.random_tensors(config).items()}
    # Blocks that add nothing to a state that is always ones, which only row 1 of the head likes.
    tensors["model.embed_tokens.weight"] += 1
    tensors["model.norm.weight"] += 1
    tensors["lm_head.weight"][1] += 1
    variant = llama.variant(tmp_path / "v", config, tensors)
    assert variant.config["eos_token_id"] == 1
    with session(variant, tmp_path) as engine:
        assert ids(engine.submit(Request(0, (5,), 6))) == [1] * 6
        assert ids(engine.submit(Request(1, (5,), 6, frozenset({1})))) == [1]


def test_a_prompt_is_computed_again_every_time(loaded):
    answers = []
    for _ in range(2):
        loaded._server.handle_completions(
            _body(Request(0, prompt(30), 2)), lambda chunk: answers.append(chunk) and False
        )
    usage = [json.loads(answer)["usage"] for answer in answers if b'"usage"' in answer]
    assert [u["prompt_tokens_details"]["cached_tokens"] for u in usage] == [0, 0]


@pytest.fixture
def held(monkeypatch):
    """Long requests do not go on behind their first token until they are cancelled."""

    def hold(flight, chunk, receive=LlamacppFlight.receive):
        end = time.monotonic() + (30 if flight.count and flight.request.max_tokens == 250 else 0)
        while not flight.cancelled and time.monotonic() < end:
            time.sleep(0.001)
        return receive(flight, chunk)

    monkeypatch.setattr(LlamacppFlight, "receive", hold)


def test_closing_a_stream_cancels_its_request(loaded, held):
    expected = ids(loaded.submit(Request(0, prompt(9), 8)))
    stream = loaded.submit(Request(1, prompt(4), 250))
    flight = stream._flight
    next(stream)
    stream.close()
    assert flight.finished.is_set()
    assert flight.count < 250
    assert list(stream) == []
    assert ids(loaded.submit(Request(2, prompt(9), 8))) == expected


def test_dropping_a_stream_cancels_its_request(loaded, held):
    stream = loaded.submit(Request(1, prompt(4), 250))
    flight = stream._flight
    next(stream)
    del stream
    gc.collect()
    assert flight.finished.wait(20)
    assert flight.count < 250


def test_a_session_closed_in_the_middle_ends_its_streams(variant, cache, held):
    with session(variant, cache) as engine:
        running, waiting = (engine.submit(Request(i, prompt(4), 250)) for i in range(2))
    assert len(list(running)) < 250
    assert list(waiting) == []
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(2, prompt(4), 1))
    engine.close()  # twice does no harm


def test_slots_run_requests_side_by_side_with_the_same_answers(variant, cache, loaded):
    requests = [Request(i, prompt(8 + i, i), 100) for i in range(8)]
    expected = [ids(loaded.submit(request)) for request in requests]
    with session(variant, cache, slots=2) as engine:
        streams = [engine.submit(request) for request in requests]
        tokens = [list(stream) for stream in streams]
    assert [ids(stream) for stream in tokens] == expected
    assert any(tokens[i + 1][0].seconds < tokens[i][-1].seconds for i in range(7))  # not one after the other


def test_a_request_may_fill_the_context_and_not_a_token_more(loaded):
    assert len(ids(loaded.submit(Request(0, prompt(246), 10)))) == 10
    with pytest.raises(UserError, match=r"prompt \(246\) and max_tokens \(11\) must fit max_context \(256\)"):
        loaded.submit(Request(0, prompt(246), 11))


def test_the_context_is_never_longer_than_the_model_was_made_for(variant, cache):
    with session(variant, cache, max_context=4096) as engine:
        assert engine.context == 256


def test_ids_outside_the_vocabulary_are_refused(loaded):
    with pytest.raises(UserError, match="token ids must be 0 to 319, got 320"):
        loaded.submit(Request(0, (5, 320), 1))


def test_the_session_says_what_it_runs_and_what_it_holds(variant, loaded):
    config = llama.shape()
    assert loaded.kernel.startswith("F32 (")
    assert loaded.weight_bytes_per_token == variant.weight_bytes - _header(variant.path / "model.safetensors")
    kv = 2 * config.layers * config.kv_heads * config.head_width * 256 * 4
    assert loaded.memory() == {"weights": loaded.weight_bytes_per_token, "kv_cache": kv}
    assert loaded.kv_bytes_per_position * 256 == kv  # max_context, a multiple of llama.cpp's own steps
    assert loaded.arithmetic == "float32"
    assert loaded.load_seconds > 0


def _header(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_small_floats_are_multiplied_as_float32_unless_the_build_can_do_better():
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
    avx2, both = "CPU : AVX2 = 1 | F16C = 1 | ", "CPU : AVX512_BF16 = 1 | FP16_VA = 1 | "
    assert [arithmetic(kind, avx2) for kind in kinds] == ["float32", "float32", "float32", "int8", "int8"]
    assert [arithmetic(kind, both) for kind in kinds] == ["float32", "float16", "bfloat16", "int8", "int8"]


def test_the_port_is_on_loopback_and_asks_for_a_key(loaded):
    address = loaded._server.listening_address
    assert address.startswith("http://127.0.0.1:")
    for path in ("/v1/completions", "/slots", "/props"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{address}{path}", timeout=5)
        assert refusal.value.code in (401, 404)


def test_the_file_is_built_once_and_loading_it_needs_no_torch(variant, cache, loaded):
    built = Llamacpp(**EXACT).build(variant, cache) / "model.gguf"
    before = built.stat().st_mtime_ns
    script = (
        "import sys, signal, pathlib, time\n"
        "from hasten.artifacts import Variant\n"
        "from hasten.engine.base import Dtype, Request\n"
        "from hasten.engine.llamacpp import Llamacpp\n"
        "caught = lambda: open('/proc/self/status').read().split('SigCgt:')[1].split()[0][-8:]\n"
        "before = caught()\n"
        "engine = Llamacpp(threads=1, weight_dtype=Dtype.float32, max_context=64)\n"
        "session = engine.load(Variant(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))\n"
        "tokens = list(session.submit(Request(0, (5, 6), 3)))\n"
        "session.close()\n"
        "heavy = [name for name in ('torch', 'pandas', 'gguf') if name in sys.modules]\n"
        "print(len(tokens), heavy, caught() == before)\n"
    )
    command = [sys.executable, "-c", script, str(variant.path), str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ}, timeout=60)
    assert result.stdout == "3 [] True\n"  # the signal handlers are still Python's
    assert result.stderr == ""
    assert built.stat().st_mtime_ns == before


def test_another_weight_dtype_is_another_file(variant, tmp_path):
    half = Llamacpp(weight_dtype=Dtype.auto).build(variant, tmp_path)
    full = Llamacpp(weight_dtype=Dtype.float32).build(variant, tmp_path)
    assert half != full
    assert (half / "model.gguf").stat().st_size < (full / "model.gguf").stat().st_size


def test_a_corrupt_checkpoint_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    weights = variant.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Llamacpp(**EXACT).load(variant, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "llamacpp").iterdir()] == [".lock"]


def test_weights_that_overflow_are_an_error_and_not_token_0(tmp_path):
    config = llama.shape()
    tensors = llama.random_tensors(config)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    variant = llama.variant(tmp_path / "v", config, tensors)
    with pytest.raises(RuntimeError, match="not finite"):
        Llamacpp(**EXACT).load(variant, tmp_path)


def test_a_verified_request_fails_where_its_logits_do_and_no_other_does(tmp_path):
    config = llama.shape(tied_head=False)
    tensors = llama.random_tensors(config)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, -1] = 0  # a direction that only token 77 has, and that makes its values overflow
    embedding[77] = 0
    embedding[77, -1] = 1
    tensors["model.layers.0.self_attn.v_proj.weight"][:, -1] = 3e38
    tensors["lm_head.weight"][77] = 0
    variant = llama.variant(tmp_path / "v", config, tensors)
    with session(variant, tmp_path) as engine:
        free = ids(engine.submit(Request(0, (5, 6, 7), 9)))
        assert ids(engine.submit(Request(1, (5, 6, 7), 9, verify=True))) == free
        assert ids(engine.submit(Request(2, (5, 6, 7), 9, frozenset({free[2]}), verify=True))) == free[:3]
        with pytest.raises(RuntimeError, match="request 3: the logits are not finite after 0 tokens"):
            list(engine.submit(Request(3, (5, 77, 7), 9, verify=True)))
        assert ids(engine.submit(Request(4, (5, 77, 7), 3))) == [0, 0, 0]  # what llama.cpp makes of it, timed
        assert ids(engine.submit(Request(5, (5, 6, 7), 9, verify=True))) == free


def test_verifying_does_not_change_the_answers_nor_what_a_timed_request_asks_for(loaded):
    assert "logprobs" not in json.loads(_body(Request(0, prompt(9), 8)))
    requests = [Request(i, prompt(9, i), 30, verify=verify) for i in range(3) for verify in (False, True)]
    answers = [ids(loaded.submit(request)) for request in requests]
    assert answers[::2] == answers[1::2]


def test_a_damaged_cached_file_is_one_sentence(variant, tmp_path):
    engine = Llamacpp(**EXACT)
    file = engine.build(variant, tmp_path) / "model.gguf"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="delete the folder to rebuild it"):
        engine.load(variant, tmp_path)


def test_a_missing_wheel_says_what_to_install(variant, cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    support = Llamacpp().supports(variant)
    assert not support
    assert 'pip install "hasten[cpu-engines]"' in str(support.reason)
    with pytest.raises(UserError, match="xllamacpp is not installed"):
        Llamacpp().load(variant, cache)


@pytest.mark.parametrize(
    ("grid", "activation", "format_or_words"),
    [
        (None, Dtype.auto, "F32"),
        (None, Dtype.float32, "F32"),
        (None, Dtype.float16, "multiplies F32 weights with float32 activations"),
        (Grid(4, 32), Dtype.auto, "Q4_0"),
        (Grid(8, 128), Dtype.auto, "Q8_0"),
        (Grid(8, 0), Dtype.auto, "group_size must be a multiple of 32"),
        (Grid(8, 32), Dtype.float32, "multiplies Q8_0 weights with int8 activations"),
    ],
)
def test_support_names_the_native_format_or_the_reason(tmp_path, grid, activation, format_or_words):
    variant = llama.variant(tmp_path / "v", llama.shape())
    variant.manifest["grid"] = grid.describe() if grid else None
    support = Llamacpp(weight_dtype=Dtype.float32, activation_dtype=activation).supports(variant)
    assert support.native
    assert support.native_format == format_or_words or format_or_words in str(support.reason)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["cuda:0"]}, r"devices must be \[cpu\]"),
        ({"micro_batch": 0}, "micro_batch must be 1 to 2048, got 0"),
        ({"slots": 0}, "slots must be 1 to 256, got 0"),
    ],
)
def test_options_are_checked_at_the_door(options, words):
    with pytest.raises(UserError, match=words):
        Llamacpp(**options)


def test_the_record_shows_options_with_auto_resolved():
    facts = Llamacpp(threads=2, weight_dtype=Dtype.auto).describe()
    assert facts["weight_dtype"] == facts["kv_cache_dtype"] == "float16"
    assert facts["flash_attention"] == "auto"
    assert (facts["threads"], facts["micro_batch"], facts["slots"]) == (2, 512, 1)


@pytest.mark.slow
def test_our_times_agree_with_the_servers_own_within_3_percent(tmp_path, monkeypatch):
    config = llama.shape(layers=6, hidden_size=256, heads=8, kv_heads=4, feed_forward_size=704, context=512)
    chunks: list[bytes] = []
    receive = LlamacppFlight.receive
    monkeypatch.setattr(LlamacppFlight, "receive", lambda flight, chunk: chunks.append(chunk) or receive(flight, chunk))
    ratios = []
    with session(llama.variant(tmp_path / "v", config), tmp_path, max_context=512) as engine:
        for i in range(9):
            tokens = list(engine.submit(Request(i, prompt(128), 128)))
            theirs = json.loads(chunks[-1])["timings"]["predicted_ms"] / 1e3
            ratios.append((tokens[-1].seconds - tokens[0].seconds) / theirs)
    assert sorted(ratios)[len(ratios) // 2] == pytest.approx(1, abs=0.03)
