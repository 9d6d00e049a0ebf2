import json

import pytest

from hasten.artifacts import write_json
from hasten.engine import gguf
from hasten.engine.base import Dtype
from hasten.engine.gguf_vocabulary import TokenType, id_vocabulary, read_vocabulary, splitting_rule
from hasten.errors import UserError
from tests.engine import llama

BYTE_LEVEL = {"type": "ByteLevel", "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


@pytest.mark.parametrize(
    ("pre_tokenizer", "rule"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (sequence(DIGITS, BYTE_LEVEL), "smollm"),
        (sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL), "default"),
        (sequence({"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}| ?"}}, BYTE_LEVEL), "llama-bpe"),
        (sequence({"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}| ?"}}, BYTE_LEVEL), "qwen2"),
        (None, "default"),
    ],
)
def test_the_splitting_rule_follows_the_pre_tokenizer(pre_tokenizer, rule):
    assert splitting_rule(pre_tokenizer) == rule


def test_a_byte_level_vocabulary_is_padded_to_the_model_and_knows_its_specials(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    vocabulary = read_vocabulary(variant.path, llama.VOCABULARY)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "smollm")
    assert vocabulary.tokens[:3] == llama.SPECIALS
    assert vocabulary.types[:4] == [TokenType.control] * 3 + [TokenType.normal]
    assert vocabulary.types[300:] == [TokenType.unused] * 20
    assert vocabulary.specials == {"bos": 0, "eos": 1, "padding": 2}
    assert all(merge.count(" ") == 1 for merge in vocabulary.merges)


def test_special_ids_come_from_config_json_where_no_name_is_given(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    (variant.path / "tokenizer_config.json").unlink()
    write_json(variant.path / "config.json", {**variant.config, "eos_token_id": [7, 8], "pad_token_id": None})
    assert read_vocabulary(variant.path, llama.VOCABULARY).specials == {"bos": 0, "eos": 7}


def test_more_tokens_than_the_model_has_rows_are_refused(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    with pytest.raises(UserError, match="holds token id 299, but the model's vocab_size is 256"):
        read_vocabulary(variant.path, 256)


@pytest.mark.parametrize("content", ['{"model": {"type": "Unigram", "vocab": []}}', "{}", "not json"])
def test_a_tokenizer_that_is_no_bpe_is_refused(tmp_path, content):
    variant = llama.variant(tmp_path / "v", llama.shape())
    (variant.path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_vocabulary(variant.path, llama.VOCABULARY)


def test_a_vocabulary_of_ids_has_no_special_token():
    vocabulary = id_vocabulary(3)
    assert vocabulary.tokens == ["0 ", "1 ", "2 "]
    assert vocabulary.specials == {}


def server(path):
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.verbosity, parameters.ui = 256, 0, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(parameters)


@pytest.mark.parametrize("text", ["The lazy dog, 2026 times!", "今天 we go 散步。", "don't  stop\n\n\tnow"])
def test_stock_llamacpp_tokenises_text_as_the_checkpoint_does(tmp_path, text):
    from tokenizers import Tokenizer

    variant = llama.variant(tmp_path / "v", llama.shape())
    gguf.write(variant, Dtype.float32, tmp_path / "v.gguf")
    ids = Tokenizer.from_file(str(variant.path / "tokenizer.json")).encode(text).ids
    stock = server(tmp_path / "v.gguf")
    greedy = {"temperature": 0.0, "max_tokens": 6, "cache_prompt": False, "ignore_eos": True}
    from_text = stock.handle_completions({"prompt": text, **greedy})
    from_ids = stock.handle_completions({"prompt": ids, **greedy})
    assert from_text["usage"]["prompt_tokens"] == len(ids)
    assert from_text["choices"][0]["text"] == from_ids["choices"][0]["text"]


def test_a_sentencepiece_vocabulary_opens_in_stock_llamacpp(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi"]
    specials = [{"id": i, "content": text, "special": True} for i, text in enumerate(texts[:3])]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "byte_fallback": True,
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": [["h", "i"], ["▁", "hi"]],
    }
    (variant.path / "tokenizer.json").write_text(json.dumps({"added_tokens": specials, "model": model}))
    write_json(variant.path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    vocabulary = read_vocabulary(variant.path, llama.VOCABULARY)
    assert vocabulary.model == "llama"
    assert vocabulary.specials == {"bos": 1, "eos": 2, "padding": 2}
    assert vocabulary.types[:4] == [TokenType.unknown, TokenType.control, TokenType.control, TokenType.byte]
    gguf.write(variant, Dtype.float32, tmp_path / "v.gguf")
    answer = server(tmp_path / "v.gguf").handle_completions({"prompt": "hi hi", "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 2  # "hi" and "▁hi"
