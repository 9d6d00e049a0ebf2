from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.config_json import to_huggingface
from hasten.model.decoder import Cache, Decoder
from tests.tiny import decoder, shape

TOLERANCE = 1e-4


def reference(model: Decoder) -> torch.nn.Module:
    """The same weights in transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**to_huggingface(model.config, bos_id=0, eos_id=1, pad_id=2), attn_implementation="eager")
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """Multi-head, grouped-query and multi-query attention; heads wider and narrower than hidden / heads."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    width = draw(st.sampled_from([0, 2, 8, 12]))
    return ModelConfig(
        layers=draw(st.integers(1, 3)),
        hidden_size=heads * 2 * draw(st.integers(1, 4)),
        heads=heads,
        kv_heads=kv_heads,
        head_size=width,
        feed_forward_size=draw(st.integers(3, 70)),
        vocab_size=draw(st.integers(10, 100)),
        context=draw(st.sampled_from([32, 64])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        norm_epsilon=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        tied_head=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(config=shapes(), seed=st.integers(0, 999), data=st.data())
def test_logits_equal_transformers_llama_for_every_shape_with_and_without_cache(
    config: ModelConfig, seed: int, data: st.DataObject
) -> None:
    model = decoder(config, seed, spread=0.2)
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 24))
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected = reference(model)(ids).logits
        assert torch.allclose(model(ids), expected, rtol=0, atol=TOLERANCE)
        cache = Cache(config, batch, length + 3, torch.float32)
        done = 0
        while done < length:  # a prompt in chunks of any size, single tokens among them
            chunk = data.draw(st.integers(1, length - done))
            logits = model(ids[:, done : done + chunk], cache)
            done += chunk
            assert logits.shape == (batch, 1, config.vocab_size)
            assert cache.length == done
            assert torch.allclose(logits, expected[:, done - 1 : done], rtol=0, atol=TOLERANCE)


def test_greedy_decoding_with_a_cache_equals_transformers_generate() -> None:
    model = decoder(spread=0.15)
    prompt = torch.tensor([[5, 17, 60, 3, 99]])
    theirs = reference(model)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, 5:].tolist()
    cache, ids, made = Cache(model.config, 1, 20, torch.float32), prompt, []
    with torch.inference_mode():
        for _ in range(12):
            ids = model(ids, cache)[:, -1:].argmax(-1)
            made.append(int(ids))
    assert made == expected
    assert len(set(made)) > 2  # a continuation that wanders: otherwise any model would agree


def test_no_position_sees_a_later_one() -> None:
    model = decoder()
    ids = torch.randint(100, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 100
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_a_cache_is_reused_by_setting_its_length_back() -> None:
    model, cache = decoder(), Cache(shape(), 1, 16, torch.float32)
    with torch.inference_mode():
        model(torch.tensor([[9, 8, 7, 6, 5, 4]]), cache)
        cache.length = 0
        again = model(torch.tensor([[3, 4, 5]]), cache)
        fresh = model(torch.tensor([[3, 4, 5]]))[:, -1:]
    assert torch.allclose(again, fresh, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_cache_costs_half_the_bytes_and_little_accuracy(dtype: torch.dtype) -> None:
    model, ids = decoder(spread=0.1), torch.randint(100, (2, 10))
    cache, full = Cache(shape(), 2, 16, dtype), Cache(shape(), 2, 16, torch.float32)
    with torch.inference_mode():
        for chunk in ids.split(5, dim=1):
            logits = model(chunk, cache)
        assert torch.allclose(logits, model(ids)[:, -1:], atol=0.05)
    assert cache.bytes * 2 == full.bytes == 2 * 2 * 2 * 2 * 16 * 8 * 4  # k, v; layers; batch; K; context; D; bytes
    assert cache.context == 16


def test_tokens_beyond_the_cache_are_an_error_not_a_silent_overwrite() -> None:
    model, cache = decoder(), Cache(shape(), 1, 4, torch.float32)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, dtype=torch.int64), cache)


def test_half_precision_weights_still_give_float32_logits_near_the_full_ones() -> None:
    model, ids = decoder(spread=0.1), torch.randint(100, (1, 10))
    with torch.inference_mode():
        full = model(ids)
        half = model.to(torch.bfloat16)(ids)
    assert half.dtype is torch.float32
    assert torch.allclose(half, full, atol=0.1)


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied, untied = Decoder(shape(tied_head=True)), Decoder(shape(tied_head=False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (Decoder(shape()) for _ in range(3))
    torch.manual_seed(1)
    first.initialise(5)
    torch.manual_seed(2)  # the global generator plays no part
    again.initialise(5)
    other.initialise(6)
    weights = first.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    assert not torch.equal(weights["model.embed_tokens.weight"], other.state_dict()["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_every_block_starts_as_the_identity_and_keeps_unit_variance_within(tied: bool) -> None:
    model = Decoder(shape(layers=3, hidden_size=64, feed_forward_size=256, tied_head=tied, initializer_range=0.05))
    model.initialise(0)
    weights = model.state_dict()
    assert weights["model.embed_tokens.weight"].std() == pytest.approx(0.05, rel=0.05)
    assert weights["lm_head.weight"].std() == pytest.approx(0.05, rel=0.05)
    assert weights["model.layers.0.mlp.up_proj.weight"].std() == pytest.approx(1 / 8, rel=0.05)  # 64 wide
    assert torch.equal(weights["model.norm.weight"], torch.ones(64))
    ids = torch.randint(100, (1, 8))
    with torch.inference_mode():
        assert torch.equal(model.model(ids), model.model.norm(model.model.embed_tokens(ids)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"kv_heads": 3}, "model.kv_heads must divide model.heads (4), got 3"),
        ({"hidden_size": 30}, "model.heads must divide model.hidden_size (30), got 4"),
        ({"hidden_size": 30, "head_size": 8}, "model.heads must divide model.hidden_size (30), got 4"),
        ({"head_size": 7}, "model.head_size must be even (RoPE turns pairs), got 7"),
        ({"head_size": -2}, "model.head_size must be even"),
        ({"context": 1}, "model.context must be at least 2, got 1"),
        ({"vocab_size": -1}, "model.vocab_size must be 0 (the tokenizer's) or more, got -1"),
    ],
)
def test_an_impossible_shape_is_refused_with_what_was_given(changes: dict[str, int], words: str) -> None:
    with pytest.raises(UserError) as error:
        shape(**changes)
    assert words in str(error.value)
