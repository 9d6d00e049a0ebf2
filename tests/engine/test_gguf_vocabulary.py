import json
import urllib.request

import pytest

from hasten.artifacts import write_json
from hasten.engine import gguf
from hasten.engine.base import Dtype
from hasten.engine.gguf_vocabulary import id_vocabulary, read_vocabulary, space_prefix, splitting_rule
from hasten.errors import UserError
from hasten.packaged.vocabulary import Piece, TokenType, write_tokenizer
from tests.engine import llama

BYTE_LEVEL = {"type": "ByteLevel", "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "use_regex": False}
LLAMA3 = (  # as Llama 3's tokenizer.json has it; Qwen 2's takes digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def split(regex, **changes):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}


@pytest.mark.parametrize(
    ("pre_tokenizer", "rule"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (sequence(DIGITS, BYTE_LEVEL), "smollm"),
        (sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL), "default"),
        (sequence(split(LLAMA3), BYTES), "llama-bpe"),
        (sequence(split(QWEN2), BYTES), "qwen2"),
        (sequence(split(r"\p{L}+|\p{N}{1,3}| ?"), BYTES), "default"),
        (sequence(split(LLAMA3.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")), BYTES), "default"),
        (sequence(split(LLAMA3, behavior="Removed"), BYTES), "default"),
        (sequence(split(LLAMA3, pattern={"String": " "}), BYTES), "default"),
        (sequence(split(LLAMA3), BYTE_LEVEL), "default"),
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


def ask(server, path, body):
    """What an endpoint answers."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def server(path):
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.verbosity, parameters.ui = 256, 0, False
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
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
    assert vocabulary.scores[texts.index("hi")] == 0
    assert vocabulary.scores[texts.index("▁hi")] == -1
    assert vocabulary.scores[texts.index("h")] == -2
    gguf.write(variant, Dtype.float32, tmp_path / "v.gguf")
    answer = server(tmp_path / "v.gguf").handle_completions({"prompt": "hi hi", "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == 2  # "hi" and "▁hi"


PIECES = {
    TokenType.control: ["<pad>", "<eos>", "<bos>"],
    TokenType.unknown: ["<unk>"],
    TokenType.user_defined: ["\n", "\n\n", "\n\n\n", "  ", "   ", "<table>"],
    TokenType.byte: [f"<0x{byte:02X}>" for byte in range(256)],
    TokenType.normal: ["▁t", "he", "▁the", "aa", "aaa", "aaaa", "今天", "▁", *"theadn今天气e"],
}
TEXTS = [
    "the the  the   the    the",
    " then\n\n\n\n\nthe<table>a</table>",
    "aaaaaaaaaaa aaa",
    "今天天气 🙂 <bos> <0x0A>\t.",
    "",
]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A Gemma with a small vocabulary of Gemma's kind, and the GGUF file that is written of it."""
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer").mkdir()
    pieces = [Piece(text, 0.0, kind) for kind, texts in PIECES.items() for text in dict.fromkeys(texts)]
    pieces = [piece._replace(score=-float(i)) for i, piece in enumerate(pieces)]
    write_tokenizer(folder / "tokenizer", pieces, {"pad": 0, "eos": 1, "bos": 2, "unk": 3})
    config = llama.gemma("SF")
    assert len(pieces) < config.vocab_size
    variant = llama.variant(folder / "v", config)
    gguf.write(variant, Dtype.float32, folder / "v.gguf")
    return variant


def test_a_gemma_vocabulary_is_read_as_it_was_made(gemma):
    vocabulary = read_vocabulary(gemma.path, llama.VOCABULARY)
    assert vocabulary.model == "llama"
    assert vocabulary.specials == {"bos": 2, "eos": 1, "padding": 0, "unknown": 3}
    assert vocabulary.tokens[4:10] == PIECES[TokenType.user_defined]  # with spaces as they stand in a text
    assert [int(kind) for kind in vocabulary.types[:11]] == [3, 3, 3, 2, 4, 4, 4, 4, 4, 4, 6]
    assert not vocabulary.space_prefix


@pytest.mark.parametrize("text", TEXTS)
def test_stock_llamacpp_tokenises_and_spells_as_a_gemma_checkpoint_does(gemma, text):
    from hasten.tokenizer.base import load_tokenizer

    tokenizer = load_tokenizer(gemma.path)
    ids = tokenizer.encode(text)
    stock = server(gemma.path.with_name("v.gguf"))
    assert ask(stock, "/tokenize", {"content": text, "parse_special": False})["tokens"] == ids
    assert ask(stock, "/detokenize", {"tokens": ids})["content"] == tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("tokenizer", "prefix"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}}, True),
        ({"normalizer": {"type": "Replace"}}, False),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
        ({"normalizer": None, "pre_tokenizer": None}, False),
    ],
)
def test_whether_a_text_begins_with_a_space_follows_the_tokenizer(tokenizer, prefix):
    assert space_prefix(tokenizer) is prefix
