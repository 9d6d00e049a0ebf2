"""Every covered family through llama.cpp against our own network, float32 weights, arithmetic and KV cache."""

import json
from contextlib import closing

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.quantiser import Scale
from hasten.engine.base import Dtype, Request
from hasten.engine.llamacpp import FlashAttention, Llamacpp
from hasten.errors import UserError
from hasten.model.huggingface import load_network, save_checkpoint
from tests.engine import llama

pytest.importorskip("xllamacpp")

EXACT = {
    "threads": 1,
    "weight_dtype": Dtype.float32,
    "kv_cache_dtype": Dtype.float32,
    "max_context": 256,
    "flash_attention": FlashAttention.disabled,
}
TOKENS = 24
NEAR_TIE = 0.01  # two logits closer than this may change places: rounding differs
ONE_EACH = ("llama-biases", "mistral", "qwen2", "qwen3", "gemma3")


def session(variant, cache, **options):
    return closing(Llamacpp(**{**EXACT, **options}).load(variant, cache))


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def probabilities(engine, prompt):
    """Natural logarithms of the most probable next tokens' probabilities, by id."""
    chunks = []
    body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, "top_k": 1, "logprobs": 10}
    engine._server.handle_completions(json.dumps(body).encode(), lambda chunk: chunks.append(chunk) and False)
    choices = [choice for chunk in chunks for choice in json.loads(chunk).get("choices", []) if choice["logprobs"]]
    return {int(one["token"]): one["logprob"] for one in choices[0]["logprobs"]["content"][0]["top_logprobs"]}


def quantised(variant, bits):
    """Its integers, with scales of either sign, as stage compress writes them."""
    made = Rtn(bits=bits, scale=Scale.signed).compress(variant, None, 0)
    manifest = {**variant.manifest, "name": f"int{bits}", "grid": made.grid.describe()}
    folder = variant.path.with_name(f"int{bits}")
    save_checkpoint(folder, made.config, made.tensors, variant.path, manifest)
    return Variant(folder)


@pytest.mark.parametrize("name", llama.CASES)
def test_greedy_continuations_equal_our_network(tmp_path, name):
    variant = llama.variant(tmp_path / "v", llama.CASES[name])
    model = load_network(variant).eval()
    different = 0
    with session(variant, tmp_path, micro_batch=32) as engine:
        for seed, length in enumerate((1, 9, 40, 100)):
            asked = prompt(length, seed)
            found = [token.id for token in engine.submit(Request(seed, asked, TOKENS))]
            with torch.inference_mode():
                logits = model(torch.tensor([[*asked, *found]]))[0, length - 1 : -1]  # (TOKENS, V)
            chosen = logits[range(TOKENS), found]
            assert float((logits.max(-1).values - chosen).max()) < NEAR_TIE
            different += int((logits.argmax(-1) != torch.tensor(found)).sum())
            ours = logits[0].log_softmax(-1)
            for id_, value in probabilities(engine, asked).items():
                assert value == pytest.approx(float(ours[id_]), abs=NEAR_TIE)
        assert len(set(found)) > 4  # a model that repeats itself would prove little
    assert different <= 2


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_fused_attention_agrees_to_its_own_rounding(tmp_path, name):
    variant = llama.variant(tmp_path / "v", llama.CASES[name])
    model = load_network(variant).eval()
    with session(variant, tmp_path, flash_attention=FlashAttention.enabled) as engine, torch.inference_mode():
        for seed, length in enumerate((1, 9, 100)):
            asked = prompt(length, seed)
            ours = model(torch.tensor([asked]))[0, -1].log_softmax(-1)
            for id_, value in probabilities(engine, asked).items():
                assert value == pytest.approx(float(ours[id_]), abs=0.03)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_quantised_variant_runs_its_own_integers(tmp_path, name, bits):
    variant = quantised(llama.variant(tmp_path / "v", llama.CASES[name]), bits)
    model = load_network(variant).eval()
    prompts = [prompt(20, seed) for seed in range(20)]
    with session(variant, tmp_path) as engine, torch.inference_mode():
        assert engine.kernel.startswith({4: "Q4_0", 8: "Q8_0"}[bits])
        theirs = [probabilities(engine, asked) for asked in prompts]
        ours = [model(torch.tensor([asked]))[0, -1].log_softmax(-1) for asked in prompts]
    # Activations are rounded to 8 bits on the way, so near ties may fall otherwise.
    same = [max(found, key=found.__getitem__) == int(own.argmax()) for found, own in zip(theirs, ours, strict=True)]
    assert sum(same) >= 15
    pairs = list(zip(theirs, ours, strict=True))
    errors = [abs(value - float(own[id_])) for found, own in pairs for id_, value in found.items()]
    assert sum(errors) / len(errors) < 0.3


def test_a_sliding_layer_keeps_no_more_than_its_window_and_a_computation(tmp_path):
    config = llama.gemma("SFSF", kv_heads=1, sliding_window=600, context=4096)
    variant = llama.variant(tmp_path / "v", config)
    values = 2 * 2 * config.head_width * 4  # keys and values, two layers of each kind, float32
    with session(variant, tmp_path, max_context=4000, micro_batch=512) as engine:
        assert engine.memory()["kv_cache"] == values * (4096 + 1280)  # cells that llama.cpp reports
        assert engine.kv_bytes_per_position == 2 * values
    with session(variant, tmp_path, max_context=300) as engine:
        assert engine.memory()["kv_cache"] == values * (512 + 512)


def test_a_window_that_llamacpp_has_not_bounds_the_context(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape(sliding_window=64))
    engine = Llamacpp(**{**EXACT, "max_context": 65})
    assert "at most this mistral's sliding_window (64), got 65" in str(engine.supports(variant).reason)
    with pytest.raises(UserError, match="has no sliding window"):
        engine.load(variant, tmp_path)
    with session(variant, tmp_path, max_context=64) as loaded:
        assert loaded.context == 64
