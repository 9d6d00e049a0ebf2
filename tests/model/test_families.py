"""Every family here gives the logits and the words of transformers' own implementation of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Checkpoint, Json, write_json
from hasten.compression.depth import Depth
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.model.config import ModelConfig
from hasten.model.config_json import FAMILIES
from hasten.model.decoder import Decoder, frequencies, rotary
from hasten.model.huggingface import load_network
from tests.compression.texts import text as calibration
from tests.model.families import (
    CASES,
    FAMILY_CASES,
    FULL,
    LINEAR,
    LLAMA3,
    LOCAL,
    SLIDING,
    VOCABULARY,
    greedy,
    our_model,
    padded_logits,
    random_ids,
    their_model,
)
from tests.tiny import write_variant

TOLERANCE = 1e-4
NARROW_CACHE_TOLERANCE = 0.02
"""What keys and values rounded to bfloat16's 8 bits may cost: the root mean square of the logits' differences, in units
of the logits' standard deviation. Measured over the cases here: at most 0.009 (at worst 0.14 in a single logit)."""

torch.set_num_threads(1)


def pair(case: str, seed: int = 0) -> tuple[Any, Decoder]:
    family, changes = CASES[case]
    theirs = their_model(family, seed, **changes)
    ours = our_model(theirs)
    assert ours.config.family == family or (family == "mistral" and not changes["sliding_window"])
    return theirs, ours


def their_logits(theirs: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = theirs(ids).logits
    return logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def test_every_covered_family_has_a_case() -> None:
    assert {CASES[case][0] for case in FAMILY_CASES} == {family for family, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 24])
def test_logits_of_a_batch_equal_transformers(case: str, length: int) -> None:
    theirs, ours = pair(case)
    ids = random_ids(3, length)
    with torch.inference_mode():
        assert difference(ours(ids), their_logits(theirs, ids)) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_in_chunks_and_single_tokens_through_the_cache_equals_transformers(case: str) -> None:
    theirs, ours = pair(case)
    ids = random_ids(2, 26)
    expected = their_logits(theirs, ids)
    cache, done = ours.new_state(2, 26, torch.float32), 0
    with torch.inference_mode():
        for chunk in (7, 1, 4, 9, 1, 1, 3):  # shorter and longer than the windows, across their ends
            logits = ours(ids[:, done : done + chunk], cache)
            done += chunk
            assert difference(logits, expected[:, done - 1 : done]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_left_padding_changes_no_real_logit_with_and_without_cache(case: str) -> None:
    theirs, ours = pair(case)
    ids, padding = random_ids(4, 19), torch.tensor([0, 3, 11, 18])
    expected = padded_logits(theirs, ids, padding)
    real = torch.arange(19) >= padding[:, None]
    cache = ours.new_state(4, 19, torch.float32)
    with torch.inference_mode():
        assert difference(ours(ids, padding=padding)[real], expected[real]) < TOLERANCE
        ours(ids[:, :12], cache, padding)
        for done in range(12, 19):
            logits = ours(ids[:, done : done + 1], cache)[:, 0]
            assert difference(logits[real[:, done]], expected[:, done][real[:, done]]) < TOLERANCE
        alone = ours(ids[2:3, 11:])[0]
    assert difference(alone, expected[2, 11:]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_greedy_continuations_equal_transformers_generate(case: str) -> None:
    theirs, ours = pair(case, seed=1)
    ids, padding = random_ids(3, 9), torch.tensor([0, 2, 6])
    mask = (torch.arange(9) >= padding[:, None]).long()
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 9:]
    made = greedy(ours, ids, 20, padding)
    assert made.tolist() == expected.tolist()
    assert len(set(made.flatten().tolist())) > 5  # continuations that wander: otherwise any model would agree
    assert greedy(ours, ids[:1], 20).tolist() == expected[:1].tolist()


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_context_far_beyond_the_windows_equals_transformers(case: str) -> None:
    family, changes = CASES[case]
    theirs = their_model(family, **{**changes, "max_position_embeddings": 4096, "num_hidden_layers": 3})
    ours, ids = our_model(theirs), random_ids(1, 1500)
    expected = their_logits(theirs, ids)
    cache = ours.new_state(1, 1500, torch.float32)
    with torch.inference_mode():
        assert difference(ours(ids), expected) < TOLERANCE
        for chunk in ids.split(600, dim=1):
            logits = ours(chunk, cache)
    assert difference(logits, expected[:, -1:]) < TOLERANCE


@pytest.mark.parametrize("theta", [100.0, 10000.0, 1_000_000.0])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3])
def test_rotary_angles_equal_transformers_to_the_last_bit_at_any_position(theta: float, scaling: Json | None) -> None:
    rope = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    theirs = their_model("llama", head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
    config = our_model(theirs).config
    positions = torch.cat([torch.arange(64), torch.arange(131_000, 131_072)])
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), positions[None])
    ours = rotary(positions, frequencies(64, config.rope_theta, config.rope_scaling))
    assert torch.equal(ours[0], cos[0])
    assert torch.equal(ours[1], sin[0])


@st.composite
def transformers_configs(draw: st.DrawFn) -> tuple[str, Json]:
    """Any family; multi-head, grouped and multi-query; heads of any even width; windows, biases, scalings, patterns."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 4))
    window = draw(st.one_of(st.none(), st.integers(1, 12)))
    kinds = draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers))
    rope = draw(st.sampled_from([None, {"rope_theta": 50.0}, LINEAR, LLAMA3]))
    fields: Json = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "hidden_size": heads * 2 * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(3, 60)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope,
    }
    width = draw(st.sampled_from([None, 2, 8, 18]))
    if width is not None or family in ("qwen3", "gemma3_text"):
        fields["head_dim"] = width or 10
    if family != "mistral" and family != "qwen2":
        fields["attention_bias"] = draw(st.booleans())
    if family == "llama":
        fields["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        fields["sliding_window"] = window
    if family in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": window is not None, "sliding_window": window}
        fields["layer_types"] = kinds if window else None
    if family == "gemma3_text":
        fields |= {
            "sliding_window": window or 4,
            "layer_types": kinds,
            "query_pre_attn_scalar": draw(st.integers(1, 40)),
        }
        fields["rope_parameters"] = None if rope is None else {FULL: {"rope_type": "default", **rope}, SLIDING: LOCAL}
    return family, fields


@settings(max_examples=60, deadline=None)
@given(shape=transformers_configs(), seed=st.integers(0, 999), data=st.data())
def test_any_shape_of_any_family_gives_the_logits_of_transformers(
    shape: tuple[str, Json], seed: int, data: st.DataObject
) -> None:
    """In doubles: a norm over heads two numbers wide magnifies what float32 rounds before it without bound."""
    theirs = their_model(shape[0], seed, **shape[1])
    ours, theirs = our_model(theirs).double(), theirs.double()
    length = data.draw(st.integers(1, 30))
    ids = random_ids(2, length, seed)
    padding = torch.tensor([0, data.draw(st.integers(0, length - 1))])
    plain, start = their_logits(theirs, ids), int(padding[1])
    alone = their_logits(theirs, ids[1:, start:])  # in doubles theirs makes NaN of padding
    cache, done = ours.new_state(2, length, torch.float64), 0
    with torch.inference_mode():
        assert difference(ours(ids), plain) < TOLERANCE
        padded = ours(ids, padding=padding)
        assert difference(padded[0], plain[0]) < TOLERANCE
        assert difference(padded[1:, start:], alone) < TOLERANCE
        while done < length:
            chunk = data.draw(st.integers(1, length - done))
            logits = ours(ids[:, done : done + chunk], cache)
            done += chunk
            assert difference(logits, plain[:, done - 1 : done]) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_a_bfloat16_cache_stays_within_its_tolerance(case: str) -> None:
    theirs, ours = pair(case)
    ids = random_ids(2, 40)
    expected = their_logits(theirs, ids)
    narrow, wide = (ours.new_state(2, 40, dtype) for dtype in (torch.bfloat16, torch.float32))
    with torch.inference_mode():
        logits = torch.cat([ours(token, narrow) for token in ids.split(1, dim=1)], dim=1)
    assert float((logits - expected).square().mean().sqrt() / expected.std()) < NARROW_CACHE_TOLERANCE
    assert narrow.bytes * 2 == wide.bytes


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_checkpoint_that_transformers_wrote_is_read_with_equal_logits(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    theirs = their_model(family, **changes)
    theirs.save_pretrained(tmp_path)
    write_json(tmp_path / "manifest.json", {"schema": 1, "kind": "checkpoint"})
    ids = random_ids(2, 20)
    with torch.inference_mode():
        ours = load_network(Checkpoint(tmp_path)).eval()(ids)
    assert difference(ours, their_logits(theirs, ids)) < TOLERANCE


def opened_by_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if model.config.model_type != "qwen2":  # whose tokenizer is always built as Qwen's: see below
        assert AutoTokenizer.from_pretrained(folder).encode("w5 w96", add_special_tokens=False) == [5, 96]
    return model


def test_the_tokenizer_of_a_qwen2_opens_in_transformers_and_splits_as_it_did(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoTokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox, 1234 times", "天气很好，我们去公园"] * 5, trainer)
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    write_json(tmp_path / "tokenizer" / "tokenizer_config.json", named)
    _, ours = pair("qwen2-gqa")
    opened = AutoTokenizer.from_pretrained(write_variant(tmp_path / "c", ours).path)
    for text in ("the  fox's 12345 times\n\n🙂 café", "我们去公园。the quick  "):
        assert opened.encode(text, add_special_tokens=False) == backend.encode(text).ids
        assert opened.decode(opened.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("case", CASES)
def test_an_exported_checkpoint_opens_in_transformers_as_its_family_with_equal_logits(
    case: str, tmp_path: Path
) -> None:
    theirs, ours = pair(case)
    exported = write_variant(tmp_path / "c", ours)
    opened = opened_by_transformers(exported.path)
    ids = random_ids(2, 20)
    assert difference(their_logits(opened, ids), their_logits(theirs, ids)) < TOLERANCE
    assert opened.config.model_type == ours.config.family
    again = load_network(exported)
    assert again.config == ours.config
    assert isinstance(again.config, ModelConfig)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (8, 8), (4, 8)])
@pytest.mark.parametrize("case", [*FAMILY_CASES, "llama-biases", "qwen2-mha-tied", "gemma3-mha-untied-wide-heads"])
def test_a_quantised_export_opens_in_transformers_with_the_logits_of_our_dequantised_decoder(
    case: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    _, ours = pair(case)
    parent = write_variant(tmp_path / "baseline", ours)
    method = Rtn(bits=bits, group_size=group_size)
    variant, _ = make_variant(method, parent, None, name="q", target=tmp_path / "q", seed=0)
    ids = random_ids(2, 20)
    with torch.inference_mode():
        expected = load_network(variant).eval()(ids)
        assert difference(expected, ours(ids)) > 1e-2  # quantising did change them
    assert difference(their_logits(opened_by_transformers(variant.path), ids), expected) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["mistral-window", "qwen2-slides-from-layer-1", "qwen3-mixed-layers", "gemma3-mixed-layers"]
)
def test_dropping_layers_keeps_each_of_the_others_at_its_own_attention(case: str, tmp_path: Path) -> None:
    _, ours = pair(case)
    with torch.no_grad():  # a layer that passes its input on is the first to go, and changes nothing
        ours.model.layers[0].self_attn.o_proj.weight.zero_()
        ours.model.layers[0].mlp.down_proj.weight.zero_()
    parent = write_variant(tmp_path / "baseline", ours)
    text = calibration(4, 20, vocabulary=VOCABULARY)
    shallow, _ = make_variant(Depth(drop=1), parent, text, name="s", target=tmp_path / "s", seed=0)
    assert shallow.manifest["notes"]["dropped"] == [0]
    ids = random_ids(2, 20)
    with torch.inference_mode():
        expected = ours(ids)
        assert difference(load_network(shallow).eval()(ids), expected) < TOLERANCE
    assert difference(their_logits(opened_by_transformers(shallow.path), ids), expected) < TOLERANCE
