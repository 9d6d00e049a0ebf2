from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hasten.artifacts import Checkpoint, Tokens, Variant, digest
from hasten.errors import UserError
from hasten.evaluation import bits_per_byte as module
from hasten.evaluation.bits_per_byte import (
    BitsPerByte,
    HeldOut,
    attempt,
    bits_per_byte,
    byte_count,
    held_out,
    metrics,
    ratio_interval,
    recorded_bits_per_byte,
    score,
    token_bits,
    windows,
)
from hasten.model.grid import Grid, floats
from hasten.model.huggingface import load_network
from hasten.tokenizer.base import Tokenizer, load_tokenizer
from tests.engine import llama
from tests.evaluation.texts import CHINESE, ENGLISH, bilingual, write_tokens
from tests.tiny import lstm, lstm_shape
from tests.tiny import write_tokenizer as write_word_tokenizer

CONTEXT = 32


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return llama.variant(tmp_path_factory.mktemp("float") / "v", llama.shape(context=CONTEXT))


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return write_tokens(tmp_path_factory.mktemp("held-out") / "tokens", tokenizer, bilingual())


def text_of(bits: list[float], sizes: list[int]) -> HeldOut:
    return HeldOut([[0, 5, 6] for _ in bits], sizes, 0, 0)


def theirs(path: Path, tensors: dict[str, torch.Tensor], tied: bool) -> torch.nn.Module:
    """The same weights in transformers, double precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(path)).double().eval()
    model.load_state_dict({name: value.double() for name, value in tensors.items()}, strict=not tied)
    return model


def nats(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """-ln p of every id but the first, (ids - 1,)."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("context", [2, 3, 8, 31, 32])
@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 31, 33, 34, 100])
def test_every_id_is_predicted_once_from_half_a_context_where_there_is_one(count: int, context: int) -> None:
    seen = []
    for start, length, skip in windows(count, context):
        assert start >= 0 and start + length < count and length <= context
        for place in range(skip, length):
            target = start + place + 1
            seen.append(target)
            assert place + 1 >= min(target, context // 2)
    assert seen == list(range(1, count))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int4", "int8 per row"])
def test_scores_equal_transformers_in_double_precision(
    stored: str, tokenizer: Tokenizer, tokens: Tokens, tmp_path: Path
) -> None:
    config = llama.shape(context=CONTEXT, tied_head=stored == "float32")
    tensors = whole = llama.random_tensors(config)
    grid = {"int4": Grid(4, 32), "int8 per row": Grid(8, 0)}.get(stored)
    if grid is not None:
        tensors = llama.quantised(whole, grid)
        whole = floats(tensors, grid)
    elif stored == "bfloat16":
        tensors = whole = {name: value.to(torch.bfloat16) for name, value in whole.items()}
    checkpoint = llama.variant(tmp_path / "v", config, tensors, grid)
    model = theirs(checkpoint.path, whole, config.tied_head)
    found = bits_per_byte(checkpoint, tokens, tokenizer)
    for language, texts in (("en", ENGLISH), ("zh", CHINESE)):
        bits = 0.0
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text)]
            for start, length, skip in windows(len(ids), CONTEXT):
                bits += float(nats(model, ids[start : start + length + 1])[skip:].sum()) / math.log(2)
        assert found[language].value == pytest.approx(bits / sum(len(text.encode()) for text in texts), rel=1e-5)
        assert found[language].n == len(texts)


def test_bytes_are_those_of_the_text_and_the_end_is_not_scored(tokens: Tokens, tokenizer: Tokenizer) -> None:
    found = held_out(tokens, tokenizer)
    for language, texts in (("en", ENGLISH), ("zh", CHINESE)):
        sizes = {tuple(tokenizer.encode(text)): len(text.encode()) for text in texts}
        assert [sizes[tuple(ids[1:])] for ids in found[language].sequences] == found[language].bytes
        assert sorted(found[language].bytes) == sorted(len(text.encode()) for text in texts)
        assert {ids[0] for ids in found[language].sequences} == {tokenizer.bos_id}


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_per_token(
    tokens: Tokens, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = llama.shape(context=CONTEXT)
    tensors = {name: torch.zeros_like(value) for name, value in llama.random_tensors(config).items()}
    found = bits_per_byte(llama.variant(tmp_path / "v", config, tensors), tokens, tokenizer)
    for entry in found.values():
        assert entry.value == pytest.approx(math.log2(llama.VOCABULARY) * entry.tokens / entry.bytes, rel=1e-6)


def test_neither_batches_nor_windows_of_other_documents_change_a_score(
    variant: Variant, tokens: Tokens, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_network(variant).eval()
    sequences = held_out(tokens, tokenizer)["zh"].sequences
    together = token_bits(model, sequences)
    assert [len(bits) for bits in together] == [len(ids) - 1 for ids in sequences]
    monkeypatch.setattr(module, "TENSOR_VALUES", 1000)  # one window, three logits at a time
    for ids, bits in zip(sequences, together, strict=True):
        np.testing.assert_allclose(token_bits(model, [ids])[0], bits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 5, 20, 40])
def test_a_prompt_is_not_scored_and_changes_nothing_after_it_for_a_decoder(variant: Variant, prompt: int) -> None:
    model, ids = load_network(variant).eval(), [int(id_) for id_ in np.random.default_rng(0).integers(3, 300, 70)]
    whole = token_bits(model, [ids, ids[:41]])
    after = token_bits(model, [ids, ids[:41]], [prompt, prompt])
    for bits, all_bits in zip(after, whole, strict=True):
        np.testing.assert_allclose(bits, all_bits[prompt - 1 :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 5, 40])
def test_an_encoder_decoder_reads_the_prompt_and_what_was_predicted_with_its_encoder(prompt: int) -> None:
    model = lstm(lstm_shape(context=CONTEXT))
    texts = [[int(id_) for id_ in np.random.default_rng(seed).integers(3, 100, 70 - seed)] for seed in range(3)]
    for ids, bits in zip(texts, token_bits(model, texts, [prompt] * 3), strict=True):
        expected = []
        for start, length, skip in windows(len(ids), CONTEXT):
            read = max(skip + 1, prompt - start)
            if read > length:
                continue
            part = torch.tensor([ids[start : start + length + 1]])
            with torch.inference_mode():
                logits = model.lm_head(model.hidden(part[:, :-1], torch.tensor([read])))[0, read - 1 :]
            expected.append(torch.nn.functional.cross_entropy(logits, part[0, read:], reduction="none") / math.log(2))
        np.testing.assert_allclose(bits, torch.cat(expected).numpy(), rtol=1e-4, atol=1e-4)


def test_the_same_work_gives_the_same_figures_on_any_number_of_threads(
    variant: Variant, tokens: Tokens, tokenizer: Tokenizer
) -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(bits_per_byte(variant, tokens, tokenizer))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_document_that_is_not_its_texts_tokens_is_left_out_and_counted(
    variant: Variant, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    broken = tokenizer.encode("公园")[:-1]  # ends inside a character
    documents = [*bilingual(), ("en", broken), ("en", [*tokenizer.encode("a"), tokenizer.pad_id or 0]), ("en", [])]
    found = held_out(write_tokens(tmp_path / "tokens", tokenizer, documents), tokenizer)
    assert (found["en"].altered, len(found["en"].sequences)) == (2, len(ENGLISH))
    assert (found["zh"].altered, len(found["zh"].sequences)) == (0, len(CHINESE))
    assert bits_per_byte(variant, Tokens(tmp_path / "tokens"), tokenizer)["en"].left_out == 2


def test_an_unknown_word_has_no_bytes_to_divide_by(tmp_path: Path) -> None:
    words = load_tokenizer(write_word_tokenizer(tmp_path / "words"))
    documents = [("en", "w5 w6 w7"), ("en", "w5 w6")]
    assert words.encode("w5 hello") == [5, 3]  # w3 stands for what it does not know
    tokens = write_tokens(tmp_path / "tokens", words, documents)
    assert sorted(held_out(tokens, words)["en"].bytes) == [5, 8]


def test_the_limit_takes_whole_documents_from_all_over_the_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [("en", f"{number:03d} {source} fox") for source in ("quick", "brown") for number in range(40)]
    documents.append(("en", "The lazy dog. " * 100))
    tokens = write_tokens(tmp_path / "tokens", tokenizer, documents)
    everything, some = held_out(tokens, tokenizer)["en"], held_out(tokens, tokenizer, 200)["en"]
    counts = [len(ids) - 1 for ids in some.sequences]
    assert 200 <= sum(counts) < 200 + max(counts)
    assert some.too_long == 1 or len(some.sequences) < 40
    assert all(ids in everything.sequences for ids in some.sequences)
    texts = tokenizer.decode_many([ids[1:] for ids in some.sequences])
    assert any("quick" in text for text in texts) and any("brown" in text for text in texts)
    assert held_out(tokens, tokenizer, 200)["en"] == some
    assert len(everything.sequences) == 81


def test_a_language_whose_documents_all_exceed_the_limit_says_so(
    variant: Variant, tokens: Tokens, tokenizer: Tokenizer
) -> None:
    found = bits_per_byte(variant, tokens, tokenizer, max_tokens_per_language=1)
    assert found["zh"].value is None
    assert found["zh"].why == "no held-out document can be scored: 3 exceed max_tokens_per_language (1)"
    assert (found["en"].n, found["en"].bytes) == (1, 1)  # the document of one token


def test_an_empty_split_and_a_single_document_have_no_interval() -> None:
    assert "there is none" in str(score(text_of([], []), []).why)
    one = score(text_of([8.0], [4]), [8.0])
    assert (one.value, one.low, one.high, one.n, one.tokens) == (2.0, None, None, 1, 2)
    assert one.why == "an interval needs at least 2 documents, got 1"


def test_documents_of_equal_length_give_the_interval_of_a_mean() -> None:
    bits = [10.0, 12.0, 9.0, 15.0, 11.0, 13.0]
    low, high = stats.t.interval(0.95, 5, np.mean(bits) / 10, stats.sem(bits) / 10)
    assert ratio_interval(bits, [10] * 6) == pytest.approx((low, high))
    assert ratio_interval(bits[:1], [10]) is None


def test_the_degrees_of_freedom_are_those_of_bell_and_mccaffrey() -> None:
    sizes = np.array([10.0, 20.0, 400.0, 35.0])
    rates = np.array([1.0, 1.5, 1.2, 0.8])
    h = sizes / sizes.sum()
    columns = (np.eye(4) - np.outer(np.ones(4), h)).T * (h / np.sqrt(1 - h))  # G, one column per document
    eigenvalues = np.linalg.eigvalsh(columns.T @ columns)
    freedom = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    error = math.sqrt(float(h**2 / (1 - h) @ (rates - h @ rates) ** 2))
    half = stats.t.ppf(0.975, freedom) * error
    expected = (max(0.0, float(h @ rates - half)), float(h @ rates + half))
    assert ratio_interval(list(sizes * rates), [int(size) for size in sizes]) == pytest.approx(expected)


@pytest.mark.parametrize("spread", [0.8, 1.2])
def test_intervals_cover_what_documents_of_such_lengths_have(spread: float) -> None:
    generator = np.random.default_rng(5)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.maximum(generator.lognormal(7, spread, count), 20).astype(int)
        rates = 1.5 + generator.normal(0, 0.2, count) + generator.normal(0, 4, count) / np.sqrt(sizes)
        return rates * sizes, sizes

    bits, sizes = draw(1_000_000)
    truth = bits.sum() / sizes.sum()
    covered = 0
    for _ in range(600):
        interval = ratio_interval(*(list(values) for values in draw(30)))
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 0.93 <= covered / 600 <= 0.985


def test_bytes_of_ids_are_exact_inside_characters_and_none_for_special_tokens(tokenizer: Tokenizer) -> None:
    for text in (*ENGLISH, *CHINESE):
        ids = tokenizer.encode(text)
        assert byte_count(tokenizer, ids) == len(text.encode())
        assert sum(byte_count(tokenizer, [id_]) for id_ in ids) == len(text.encode())
    assert byte_count(tokenizer, [0, 1, 2, 319]) == 0  # 319: a row of the model that no token has


def test_bytes_of_another_tokenizers_ids_are_those_of_their_text(tmp_path: Path) -> None:
    words = load_tokenizer(write_word_tokenizer(tmp_path / "words"))
    assert byte_count(words, [5, 6, 1]) == len("w5 w6")


def test_a_logit_that_is_not_a_number_is_an_error(variant: Variant) -> None:
    model = load_network(variant).eval()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        token_bits(model, [[0, 5, 6]])


def test_tokens_of_another_tokenizer_are_refused(variant: Variant, tokens: Tokens, tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.backend, bos_id=7, eos_id=1, pad_id=None)
    with pytest.raises(UserError, match=r"must begin with the tokenizer's bos \(7\).*another tokenizer"):
        held_out(tokens, other)


def test_ids_beyond_the_models_vocabulary_are_refused(tokens: Tokens, tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = llama.variant(tmp_path / "v", llama.shape(vocab_size=280))
    with pytest.raises(UserError, match=r"must be below the vocabulary of .* \(280\), got 2\d\d"):
        bits_per_byte(small, tokens, tokenizer)


def test_a_variants_file_holds_every_language_and_reads_back(variant: Variant, tokens: Tokens, tmp_path: Path) -> None:
    from hasten.artifacts import write_json

    before = digest(variant.path)
    found = attempt(variant, tokens.path, variant.path, BitsPerByte())
    assert digest(variant.path) == before
    write_json(tmp_path / "v.json", found)
    assert recorded_bits_per_byte(tmp_path / "v.json") == found
    assert found["languages"].keys() == {"en", "zh"}
    english = found["languages"]["en"]
    assert english.keys() == {"value", "ci95", "n", "tokens", "bytes", "left_out"}
    assert english["ci95"][0] <= english["value"] <= english["ci95"][1]
    assert (english["n"], english["bytes"]) == (len(ENGLISH), sum(len(text.encode()) for text in ENGLISH))
    assert metrics(found)["bits_per_byte_en"] == english["value"]
    assert metrics(found)["bits_per_byte_zh_high"] == found["languages"]["zh"]["ci95"][1]
    assert found["why"] == {}


def test_a_variant_that_cannot_be_scored_is_kept_and_says_why(
    tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = llama.shape(context=CONTEXT)
    tensors = llama.random_tensors(config)
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    overflowing = llama.variant(tmp_path / "v", config, tensors)
    found = attempt(overflowing, tokens.path, overflowing.path, BitsPerByte())
    assert found["languages"] == {}
    assert found["why"] == {"bits_per_byte": "RuntimeError: the logits are not finite"}
    assert metrics(found) == {}
    assert "bits per byte of v could not be measured: RuntimeError" in capsys.readouterr().err
    missing = attempt(Checkpoint(tmp_path / "nowhere"), tokens.path, overflowing.path, BitsPerByte())
    assert "does not exist" in json.dumps(missing["why"])


def test_without_a_file_the_reason_is_that(tmp_path: Path) -> None:
    assert recorded_bits_per_byte(tmp_path / "x.json") == {
        "languages": {},
        "why": {"bits_per_byte": f"{tmp_path}/x.json does not exist"},
    }


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_tokens_per_language must be 0 \(all\) or more, got -1"):
        BitsPerByte(-1)
