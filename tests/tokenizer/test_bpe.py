from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.artifacts import digest, write_json
from hasten.errors import UserError
from hasten.tokenizer.base import Tokenizer, TrainingText, load_tokenizer
from hasten.tokenizer.bpe import SPECIAL_TOKENS, Bpe

ENGLISH = [f"the quick brown fox number {n} jumps over the lazy dog" for n in range(300)]
CHINESE = [f"今天的天气非常好，我们去公园散步{n}。" for n in range(300)]


def training_text() -> TrainingText:
    documents = [("en", text) for text in ENGLISH] + [("zh", text) for text in CHINESE]
    sizes = {"en": sum(map(len, ENGLISH)), "zh": sum(len(text.encode()) for text in CHINESE)}
    return TrainingText(sizes, lambda: iter(documents))


def build(folder: Path, recipe: Bpe) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    recipe.build(training_text(), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe")
    build(path, Bpe(vocabulary=500))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@given(text=st.text())
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(texts=st.lists(st.text(), max_size=5))
def test_batches_encode_like_single_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many(texts) == ids
    assert tokenizer.decode_many(ids) == texts


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text())
def test_transformers_reads_the_folder_with_the_same_ids(theirs: Any, tokenizer: Tokenizer, text: str) -> None:
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert tuple(theirs.encode(text)) == tokenizer.prompt_ids(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_the_marks_of_a_text_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.prompt_ids("fox") == (0, *tokenizer.encode("fox"))
    assert tokenizer.completion_ids(" fox") == (*tokenizer.encode(" fox"), 1)


def test_text_that_spells_a_mark_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|eos|>b<|bos|>")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "a<|eos|>b<|bos|>"


def test_each_digit_is_its_own_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2024")) == 4


def test_frequent_chinese_takes_less_than_a_token_per_character(tokenizer: Tokenizer) -> None:
    text = "今天的天气非常好"
    assert len(tokenizer.encode(text)) < len(text)


def test_training_is_deterministic(folder: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", Bpe(vocabulary=500))
    assert digest(folder) == digest(tmp_path / "again")


def test_a_balanced_sample_gives_languages_equal_shares() -> None:
    documents = [("en", f"english text {n}") for n in range(9000)] + [("zh", f"中文文本{n}") for n in range(1000)]
    sizes = {"en": 9000 * 17, "zh": 1000 * 15}
    text = TrainingText(sizes, lambda: iter(documents))

    def chinese_share(balanced: bool) -> float:
        sample = list(Bpe(sample_bytes=16_000, balance_languages=balanced).sample(text))
        assert 13_000 < sum(len(content.encode()) for content in sample) < 19_000
        return sum(content.startswith("中") for content in sample) / len(sample)

    assert 0.4 < chinese_share(True) < 0.6
    assert 0.05 < chinese_share(False) < 0.15


def test_a_small_corpus_is_used_whole() -> None:
    assert list(Bpe().sample(training_text())) == ENGLISH + CHINESE


@pytest.mark.parametrize("option", ["vocabulary", "sample_bytes", "minimum_frequency"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} must be at least"):
        Bpe(**{option: 0})


def test_a_llama_checkpoint_keeps_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    """transformers must not rebuild the tokenizer from the model type of the checkpoint that it lies in."""
    from transformers import AutoTokenizer

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_json(tmp_path / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the lazy dog 2024, 今天的天气"
    assert theirs.encode(text, add_special_tokens=False) == load_tokenizer(folder).encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "not a readable tokenizer.json"),
        ("tokenizer_config.json", "[", "not readable JSON"),
        ("tokenizer_config.json", "{}", "names no end-of-text token"),
    ],
)
def test_a_corrupt_folder_is_named(folder: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
