from pathlib import Path

import pytest

from hasten.artifacts import digest, read_json, write_json
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


def test_the_chat_template_and_the_licence_come_along(tmp_path: Path, source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE").write_text("terms")
    (source / "tokenizer.model").write_bytes(b"pieces")
    config = read_json(source / "tokenizer_config.json")
    write_json(source / "tokenizer_config.json", {**config, "chat_template": "{{ bos_token }}"})
    build(tmp_path, Imported(path=str(source)))
    assert (tmp_path / "imported" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "imported" / "LICENSE").read_text() == "terms"
    assert (tmp_path / "imported" / "tokenizer.model").read_bytes() == b"pieces"
    assert read_json(tmp_path / "imported" / "tokenizer_config.json")["chat_template"] == "{{ bos_token }}"


def test_what_is_copied_must_lie_in_the_folder(tmp_path: Path, source: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / "chat_template.jinja").symlink_to("../secret")
    with pytest.raises(UserError, match=r"chat_template\.jinja must be a file of its folder"):
        build(tmp_path, Imported(path=str(source)))


def test_the_manifest_names_no_local_path(tmp_path: Path, source: Path) -> None:
    build(tmp_path, Imported(path=str(source), eos="</s>"))
    manifest = read_json(tmp_path / "imported" / "manifest.json")
    assert manifest["source"] == {"sha256": digest(source / "tokenizer.json")}
    assert manifest["options"] == {"accept_licence": "", "bos": "", "eos": "</s>", "pad": ""}


def test_of_several_end_tokens_the_first_is_the_one(tmp_path: Path, source: Path) -> None:
    write_json(source / "special_tokens_map.json", {"eos_token": [{"content": "</s>"}, "<s>"]})
    assert build(tmp_path, Imported(path=str(source))).eos_id == 1


def add_token(source: Path, token: str) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens([token])
    backend.save(str(source / "tokenizer.json"))


def test_an_added_token_that_the_model_cannot_embed_is_left_out(tmp_path: Path, source: Path) -> None:
    """As Gemma 3's <image_soft_token> is given out with models that only read."""
    add_token(source, "<image>")
    write_json(source / "config.json", {"vocab_size": 5})
    (source / "tokenizer.model").write_bytes(b"with <image>")
    tokenizer = build(tmp_path, Imported(path=str(source)))
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("hello world") == [2, 3]
    assert read_json(tmp_path / "imported" / "manifest.json")["dropped"] == ["<image>"]
    assert not (tmp_path / "imported" / "tokenizer.model").exists()


def test_what_is_needed_or_can_be_embedded_is_kept(tmp_path: Path, source: Path) -> None:
    add_token(source, "<image>")
    write_json(source / "config.json", {"vocab_size": 6})
    assert build(tmp_path, Imported(path=str(source))).vocab_size == 6
    write_json(source / "config.json", {"vocab_size": 5})
    (tmp_path / "again").mkdir()
    Imported(path=str(source), pad="<image>").build(NOTHING, tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").pad_id == 5


@pytest.mark.parametrize("broken", ['{"a": NaN}', '{"a": "\\ud800"}', "[]", "{"])
def test_a_malformed_config_is_one_sentence(tmp_path: Path, source: Path, broken: str) -> None:
    (source / "tokenizer_config.json").write_text(broken)
    with pytest.raises(UserError, match=r"tokenizer_config\.json") as error:
        build(tmp_path, Imported(path=str(source)))
    assert "\n" not in str(error.value)


def test_a_packaged_tokenizer_asks_for_its_licence() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.accept_licence=gemma"):
        Imported(path="package:gemma3-270m").build(NOTHING, Path("nowhere"))
