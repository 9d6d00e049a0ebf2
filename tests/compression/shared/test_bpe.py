from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from hasten.artifacts import Json, read_json, write_json
from hasten.compression.shared.bpe import SPACE, Bpe, encode, ids_of, renumbered_config
from hasten.errors import UserError
from hasten.tokenizer.base import Tokenizer, load_tokenizer, parse_backend, write_tokenizer

SPECIALS = ["<bos>", "<eos>", "<pad>", "<unk>", "<spare>"]
TEXT = [
    "The quick brown fox jumps over the lazy dog 2026 times; then the dog jumps over the fox, lazily.",
    "今天天气很好，我们去公园散步吧。天气预报说明天有雨，公园里没有人。",
    "aaaa aaa aa banana bandana  two  spaces\n\n\nlines and 🙂 naïve café",
] * 3
WORDS = [
    "The",
    "quick",
    "lazy",
    "dog",
    "fox",
    "jumps",
    "2026",
    "今天",
    "公园",
    "天气",
    "banana",
    "aaaa",
    "\n",
    "",
    "🙂",
    "é",
    "▁",
    "<bos>",
    "<0x41>",
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
)


def byte_level(folder: Path) -> Path:
    """Bytes, then pairs; digits one by one."""
    backend = tokenizers.Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return written(folder, backend)


def sentencepiece(folder: Path) -> Path:
    """Characters, then pairs in every way to cut a piece; runs of line ends are tokens; bytes spell what is unknown."""
    plain = tokenizers.Tokenizer(models.BPE())
    plain.normalizer = normalizers.Replace(" ", SPACE)
    plain.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learnt = sorted(plain.get_vocab(), key=plain.get_vocab().__getitem__)
    pieces = [
        *SPECIALS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\n",
        "\n\n",
        *(x for x in learnt if "\n" not in x),
    ]
    pieces = list(dict.fromkeys([*pieces, SPACE, SPACE * 2]))
    known = set(learnt)
    merges = [
        (one[:cut], one[cut:])
        for one in learnt
        for cut in range(len(one) - 1, 0, -1)
        if one[:cut] in known and one[cut:] in known and "\n" not in one
    ]
    backend = tokenizers.Tokenizer(
        models.BPE({x: i for i, x in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("\n\n", "\n")])
    return written(folder, backend)


def written(folder: Path, backend: tokenizers.Tokenizer) -> Path:
    folder.mkdir(parents=True)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    write_tokenizer(folder, backend, {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}, {}, {})
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {"byte-level": byte_level, "sentencepiece": sentencepiece}


class Case:
    """A tokenizer, and what is left of it when a third of its tokens stay beside those that must."""

    def __init__(self, folder: Path, seed: int) -> None:
        bpe = Bpe.read(folder)
        self.kept = set(bpe.named({}))
        for id_ in random.Random(seed).sample(sorted(bpe.texts), len(bpe.texts) // 4):
            self.kept |= bpe.way(id_)
        self.order = sorted(self.kept)
        self.old = load_tokenizer(folder)
        content = bpe.reduced(self.order)["tokenizer.json"]
        self.new = Tokenizer(parse_backend(json.dumps(content)), 0, 1, 2)


@pytest.fixture(scope="module", params=[(kind, seed) for kind in KINDS for seed in (0, 1, 2)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, seed = request.param
    found = Case(KINDS[kind](tmp_path_factory.mktemp("tokenizer") / "t"), seed)
    assert 300 < len(found.kept) < len(found.old.backend.get_vocab()) - 40
    return found


@settings(max_examples=120)
@given(text=TEXTS)
@example("")
@example("\x00\uffff\U0010ffff")
def test_every_text_is_encoded_and_reads_as_it_did(case: Case, text: str) -> None:
    ids = case.new.encode(text)
    assert case.new.decode(ids) == case.old.decode(case.old.encode(text))
    assert all(0 <= id_ < len(case.kept) for id_ in ids)
    if text:
        assert ids


@settings(max_examples=120)
@given(text=TEXTS)
def test_text_of_tokens_that_stay_is_encoded_into_the_same_ones(case: Case, text: str) -> None:
    before = case.old.encode(text)
    while not case.kept.issuperset(before):  # leave out what needs a token that went
        gone = next(i for i, id_ in enumerate(before) if id_ not in case.kept)
        text = case.old.decode(before[:gone]) + case.old.decode(before[gone + 1 :])
        shorter = case.old.encode(text)
        if len(shorter) >= len(before):
            break
        before = shorter
    if case.kept.issuperset(before):
        assert [case.order[id_] for id_ in case.new.encode(text)] == before


@pytest.mark.parametrize("kind", KINDS)
def test_our_joining_is_the_librarys(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "t")
    bpe, backend = Bpe.read(folder), load_tokenizer(folder).backend
    words = ["banana", "jumps", "lazily", "quick", "bandana", "天气预报", "aaaaaaa"]
    for word in words:
        text = backend.pre_tokenizer.pre_tokenize_str(word)[0][0] if bpe.byte_level else word
        assert encode(text, bpe.ranks)[0] == backend.encode(word, add_special_tokens=False).tokens


def test_control_tokens_stay_where_a_file_speaks_of_them_and_nowhere_else(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "t")
    bpe = Bpe.read(folder)
    assert {bpe.ids[text] for text in SPECIALS} & bpe.named({}) == {0, 1, 2}
    assert 4 in Bpe.read(folder).named({"sep_token_id": [4]})
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "additional_special_tokens": [{"content": "<spare>"}]})
    assert 4 in Bpe.read(folder).named({})
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text("{{ x }}<spare>")
    assert 4 in Bpe.read(folder).named({})


def test_what_names_a_token_by_number_is_renumbered(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "t")
    config = read_json(folder / "tokenizer_config.json")
    decoder = {str(i): {"content": text, "special": True} for i, text in enumerate(SPECIALS)}
    write_json(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": decoder})
    (folder / "tokenizer.model").write_bytes(b"stale")
    bpe = Bpe.read(folder)
    kept = sorted({1, 2, 4, *(bpe.ids[text] for text in bpe.spelling)})
    files = bpe.reduced([*kept, bpe.ids["<bos>"]])  # the beginning has changed its place, to be seen
    content = files["tokenizer.json"]
    assert content is not None
    assert content["post_processor"]["special_tokens"]["<bos>"]["ids"] == [len(kept)]
    assert files["tokenizer.model"] is None
    assert files["tokenizer_config.json"] is not None
    left = files["tokenizer_config.json"]["added_tokens_decoder"]
    assert {id_: one["content"] for id_, one in left.items()} == {
        "0": "<eos>", "1": "<pad>", "2": "<spare>", str(len(kept)): "<bos>"
    }  # fmt: skip
    backend = tokenizers.Tokenizer.from_str(json.dumps(bpe.reduced(sorted([0, *kept]))["tokenizer.json"]))
    assert backend.encode("a").ids[0] == 0


@pytest.mark.parametrize("kind", ["RobertaProcessing", "Sequence"])
def test_other_post_processors_are_renumbered_too(kind: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "t")
    processor: Json = {"type": "RobertaProcessing", "sep": ["<eos>", 1], "cls": ["<spare>", 4], "trim_offsets": True}
    processor["add_prefix_space"] = False
    if kind == "Sequence":
        processor = {"type": "Sequence", "processors": [processor]}
    write_json(folder / "tokenizer.json", {**read_json(folder / "tokenizer.json"), "post_processor": processor})
    bpe = Bpe.read(folder)
    named = sorted(bpe.named({}))
    assert 4 in named
    backend = tokenizers.Tokenizer.from_str(json.dumps(bpe.reduced(named)["tokenizer.json"]))
    assert backend.encode("a").tokens == ["<spare>", "a", "<eos>"]
    assert backend.encode("a").ids[0] == named.index(4)


def test_a_models_config_is_renumbered() -> None:
    config = {"bos_token_id": 7, "eos_token_id": [9, 7], "pad_token_id": None, "hidden_size": 9}
    assert sorted(ids_of(config)) == [7, 7, 9]
    new = renumbered_config(config, {7: 0, 9: 1})
    assert new == {"bos_token_id": 0, "eos_token_id": [1, 0], "pad_token_id": None, "hidden_size": 9}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"type": "Unigram"}, "must hold a BPE tokenizer, got 'Unigram'"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix must be empty, got '##'"),
        ({"vocab": {"a": 0}}, "must have a token for each byte, so that every text is encoded, got no"),
    ],
)
def test_tokenizers_that_could_not_spell_everything_are_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = byte_level(tmp_path / "t")
    content = read_json(folder / "tokenizer.json")
    write_json(folder / "tokenizer.json", {**content, "model": {**content["model"], **change}})
    with pytest.raises(UserError, match=words):
        Bpe.read(folder)
