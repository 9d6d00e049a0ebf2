from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hasten.artifacts import (
    Artifact,
    Checkpoint,
    Group,
    Tokens,
    Variant,
    digest,
    disk_is_full,
    load_checkpoint,
    read_json,
    replacing,
    write_json,
)
from hasten.errors import UserError
from tests.tiny import write_checkpoint, write_tokens, write_variant


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_replacing_puts_a_folder_in_place_of_the_old_one_with_nothing_of_it_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "artifact"
    for name in ("old", "new"):
        with replacing(target) as folder:
            folder.mkdir()
            (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert leftovers(target.parent) == []


def test_replacing_swaps_files_and_folders_for_each_other(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with replacing(target) as folder:
        folder.mkdir()
    with replacing(target) as file:
        file.write_text("file")
    assert target.read_text() == "file"
    with replacing(target) as file:
        file.write_text("another")
    assert target.read_text() == "another"
    with replacing(target) as folder:
        folder.mkdir()
    assert target.is_dir()
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_in_one_sentence_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "artifact"
    sentence = f"^{target} could not be written: no space left on the device$"
    with pytest.raises(UserError, match=sentence), replacing(target) as folder:
        folder.mkdir()
        (folder / "half").write_text("half")
        with Path("/dev/full").open("w") as full:
            full.write("x")
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (OSError(13, "Permission denied"), False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("Disk quota exceeded (os error 122)"), True),
        (RuntimeError("os error 2"), False),
    ],
)
def test_a_full_disk_is_recognised_however_a_library_says_it(tmp_path: Path, error: Exception, full: bool) -> None:
    assert disk_is_full(error, tmp_path) is full


def test_a_short_write_without_a_reason_is_a_full_disk_where_nothing_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = OSError("1572864 requested and 750824 written")  # as numpy says it
    for free, full in ((2**30, False), (4096, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert disk_is_full(short, tmp_path) is full


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(143)])
def test_replacing_leaves_the_old_artifact_and_nothing_half_written_on_an_error(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "kept").write_text("old")

    def write() -> None:
        with replacing(target) as folder:
            folder.mkdir()
            (folder / "half").write_text("written")
            assert leftovers(tmp_path)  # it is being written beside the target
            raise error

    with pytest.raises(type(error)):
        write()
    assert (target / "kept").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_replacing_with_nothing_written_is_an_error_that_keeps_the_old_artifact(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert target.is_dir()
    assert leftovers(tmp_path) == []


def test_a_process_killed_while_writing_leaves_no_artifact(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from hasten.artifacts import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as folder:\n"
        "    folder.mkdir(); (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "artifact")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "artifact").exists()


def test_json_is_read_back_as_written_readable_by_people(tmp_path: Path) -> None:
    value = {"language": "中文", "figure": 0.1, "none": None, "nested": {"list": [1, 2]}}
    write_json(tmp_path / "deep" / "a.json", value)
    assert read_json(tmp_path / "deep" / "a.json") == value
    assert "中文" in (tmp_path / "deep" / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_json_never_holds_nan(tmp_path: Path, figure: float) -> None:
    write_json(tmp_path / "a.json", {"figure": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"figure": figure})
    assert read_json(tmp_path / "a.json") == {"figure": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b'{"a": ', "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[1]", "object"),
    ],
)
def test_unusable_json_is_one_sentence_with_the_path(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_a_folder_where_a_file_should_be_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not readable JSON"):
        read_json(tmp_path)


def test_a_digest_changes_with_any_byte_name_or_file_and_with_nothing_else(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        return digest(tmp_path / name)

    base = folder("a", {"x": "1", "sub/y": "2"})
    assert folder("b", {"sub/y": "2", "x": "1"}) == base
    different = [
        folder("c", {"x": "1", "sub/y": "3"}),
        folder("d", {"x": "1", "sub/z": "2"}),
        folder("e", {"x": "1", "y": "2"}),
        folder("f", {"x": "1", "sub/y": "2", "more": ""}),
        folder("g", {"x": "2", "sub/y": "1"}),
    ]
    assert len({base, *different}) == 6
    assert digest(tmp_path / "a" / "x") == digest(tmp_path / "b" / "x") != digest(tmp_path / "a" / "sub" / "y")


def test_the_digest_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        digest(tmp_path / "nothing")


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"schema": 2})
    with pytest.raises(UserError, match="has schema 2, expected 1"):
        _ = Artifact(tmp_path).manifest
    write_json(tmp_path / "manifest.json", {"kind": "tokens"})
    with pytest.raises(UserError, match="has schema None"):
        _ = Artifact(tmp_path).manifest


def test_tokens_are_memory_mapped_and_cannot_be_written(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", train=100, validation=0)
    ids = tokens.ids("train")
    assert isinstance(ids, np.memmap)
    assert ids[:3].tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
    assert tokens.offsets("train")[-1] == len(ids) == 100
    assert len(tokens.languages("train")) == len(tokens.offsets("train")) - 1 == 5
    assert len(tokens.ids("validation")) == 0  # an empty file cannot be mapped


def test_groups_follow_each_other_and_those_without_tokens_are_left_out(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", train=100, validation=40)
    facts = read_json(tokens.path / "manifest.json")
    sizes = {("a", "en"): (60, 0), ("a", "zh"): (0, 0), ("b", "en"): (40, 40)}
    facts["groups"] = [
        {"source": source, "language": language, "splits": {"train": {"tokens": t}, "validation": {"tokens": v}}}
        for (source, language), (t, v) in sizes.items()
    ]
    write_json(tokens.path / "manifest.json", facts)
    tokens = Tokens(tokens.path)
    assert tokens.groups("train") == [Group("a", "en", 0, 60), Group("b", "en", 60, 40)]
    assert tokens.groups("validation") == [Group("b", "en", 0, 40)]
    assert tokens.groups("validation")[0].name == "b/en"


def test_tokens_that_name_no_groups_are_to_be_made_again(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", train=100, validation=40)
    facts = read_json(tokens.path / "manifest.json")
    del facts["groups"]
    write_json(tokens.path / "manifest.json", facts)
    with pytest.raises(
        UserError, match=r"manifest\.json must name its groups: these tokens are old, run `prepare` again"
    ):
        Tokens(tokens.path).groups("train")


@pytest.mark.parametrize("name", ["train.bin", "train.offsets.npy", "train.languages.npy"])
def test_missing_token_files_are_one_sentence(tmp_path: Path, name: str) -> None:
    tokens = write_tokens(tmp_path / "tokens", train=100, validation=20)
    (tokens.path / name).unlink()
    read = {"bin": tokens.ids, "offsets": tokens.offsets, "languages": tokens.languages}[name.split(".")[1]]
    with pytest.raises(UserError, match=name):
        read("train")


def test_tokens_cut_in_the_middle_of_an_id_are_one_sentence(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", train=100, validation=20)
    path = tokens.path / "train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train\.bin"):
        tokens.ids("train")


def test_a_checkpoint_is_a_variant_when_its_manifest_says_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base")
    write_variant(tmp_path / "baseline")
    assert type(load_checkpoint(tmp_path / "base")) is Checkpoint
    variant = load_checkpoint(tmp_path / "baseline")
    assert isinstance(variant, Variant)
    assert (variant.name, variant.lineage) == ("baseline", ["baseline"])
    assert variant.weight_bytes == (tmp_path / "baseline" / "model.safetensors").stat().st_size > 0


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a checkpoint: it has no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "not safetensors"])
def test_unreadable_weights_are_one_sentence(tmp_path: Path, damage: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    path = checkpoint.path / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[:-100], "empty": b"", "not safetensors": b"x" * 1000}[damage])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.tensors()


def test_artifact_bytes_hold_no_time_host_or_folder(tmp_path: Path) -> None:
    model_file = write_checkpoint(tmp_path / "a").path / "model.safetensors"
    header = model_file.read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in model_file.parent.iterdir())
    assert torch.equal(Checkpoint(tmp_path / "a").tensors()["model.norm.weight"].isfinite(), torch.ones(32).bool())


def test_stored_tensors_are_equal_to_views_and_share_no_memory(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    views, stored = checkpoint.tensors(), checkpoint.stored().with_copy("head", "model.embed_tokens.weight")
    assert list(stored) == [*views, "head"]
    assert len(stored) == len(views) + 1
    assert "head" in stored
    assert "lm_head.weight" not in stored
    own = dict(stored)
    assert torch.equal(own.pop("head"), views["model.embed_tokens.weight"])
    assert all(torch.equal(own[name], value) for name, value in views.items())
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in own.values())
    assert len({value.data_ptr() for value in own.values()}) == len(own)
