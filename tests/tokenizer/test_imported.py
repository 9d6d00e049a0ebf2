from pathlib import Path

import pytest

from hasten.artifacts import read_json, write_json
from hasten.errors import UserError
from hasten.tokenizer.base import Tokenizer, TrainingText, load_tokenizer
from hasten.tokenizer.imported import Imported

NOTHING = TrainingText({}, lambda: iter(()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A word-level tokenizer that pads and truncates, as a Hugging Face folder."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2, "world": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(1)
    folder = tmp_path / "source"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>"},
        "auto_map": {"AutoTokenizer": ["elsewhere--code.py", None]},
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {"eos_token": "</s>"})
    return folder


def build(tmp_path: Path, recipe: Imported) -> Tokenizer:
    (tmp_path / "imported").mkdir()
    recipe.build(NOTHING, tmp_path / "imported")
    return load_tokenizer(tmp_path / "imported")


def test_a_folder_is_taken_with_its_special_tokens(tmp_path: Path, source: Path) -> None:
    tokenizer = build(tmp_path, Imported(path=str(source)))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.encode("hello world") == [2, 3]  # the source's truncation does not apply
    assert tokenizer.vocab_size == 5


def test_nothing_that_runs_code_from_elsewhere_is_kept(tmp_path: Path, source: Path) -> None:
    build(tmp_path, Imported(path=str(source)))
    assert "auto_map" not in read_json(tmp_path / "imported" / "tokenizer_config.json")


def test_transformers_reads_what_was_imported(tmp_path: Path, source: Path) -> None:
    from transformers import AutoTokenizer

    build(tmp_path, Imported(path=str(source)))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert theirs.encode("hello world", add_special_tokens=False) == [2, 3]
    assert theirs.eos_token == "</s>"


def test_special_tokens_can_be_named(tmp_path: Path, source: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    with pytest.raises(UserError, match=r"tokenizer\.eos must be given"):
        Imported(path=str(source)).build(NOTHING, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.pad must be in the vocabulary of .*, got '<pad>'"):
        Imported(path=str(source), eos="</s>", pad="<pad>").build(NOTHING, tmp_path)
    tokenizer = build(tmp_path, Imported(path=str(source / "tokenizer.json"), eos="</s>"))
    assert tokenizer.bos_id == tokenizer.eos_id == 1  # without a beginning token, the end marks the beginning too


def test_a_path_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got nothing"):
        Imported().build(NOTHING, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Imported(path=str(tmp_path / "absent")).build(NOTHING, tmp_path)
