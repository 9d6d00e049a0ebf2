from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.errors import UserError
from hasten.sources import copy_licences, licence_files, resolve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub that notes what it is asked for; `error` is raised if it is set."""
    import huggingface_hub

    asked: dict[str, Any] = {"error": None}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        if asked["error"]:
            raise asked["error"]
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [])
    return asked


def test_a_folder_and_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(tmp_path / "tokenizer.json")) == tmp_path / "tokenizer.json"


def test_an_id_is_fetched_from_the_hub_at_its_revision(tmp_path: Path, hub: dict[str, Any]) -> None:
    assert resolve("org/name-1.5", "abc123") == tmp_path / "snapshot"
    assert (hub["name"], hub["revision"]) == ("org/name-1.5", "abc123")
    resolve("org/name")
    assert hub["revision"] is None


def test_neither_code_nor_pickles_are_fetched(hub: dict[str, Any]) -> None:
    from fnmatch import fnmatchcase

    resolve("org/name")

    def wanted(name: str) -> bool:
        allowed = any(fnmatchcase(name, pattern) for pattern in hub["allow_patterns"])
        return allowed and not any(fnmatchcase(name, pattern) for pattern in hub["ignore_patterns"])

    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "LICENSE.md"):
        assert wanted(name), name
    for name in ("chat_template.jinja", "tokenizer.model", "merges.txt", "license.txt", "Notice", "USE_POLICY.md"):
        assert wanted(name), name
    for name in (
        "pytorch_model.bin",
        "modeling_own.py",
        "onnx/model.safetensors",
        "consolidated.safetensors",
        "LICENSE.bin",
    ):
        assert not wanted(name), name


def test_a_folder_of_that_name_goes_before_the_hub(
    tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")
    assert "name" not in hub


@pytest.mark.parametrize("error", [OSError("offline\nand more"), ValueError("x" * 1000), RuntimeError()])
def test_whatever_the_hub_answers_is_one_sentence(hub: dict[str, Any], error: Exception) -> None:
    hub["error"] = error
    with pytest.raises(UserError, match="no folder 'org/name', and the Hugging Face Hub did not give it") as got:
        resolve("org/name", "v1")
    assert "at revision 'v1'" in str(got.value)
    assert "\n" not in str(got.value)
    assert len(str(got.value)) < 400


def test_offline_an_id_that_is_not_cached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="the Hugging Face Hub did not give it"):
        resolve("org/name")


@pytest.mark.parametrize("path", ["absent", "a/b/c", "../x", "http://example.org/model"])
def test_what_is_no_source_is_refused(path: str) -> None:
    accepted = "model.path must be a folder, ORG/NAME on the Hugging Face Hub or package:NAME"
    with pytest.raises(UserError, match=f"{accepted}, got {path!r}, which does not exist"):
        resolve(path)
    with pytest.raises(UserError, match=f"{accepted.replace('model', 'tokenizer')}, got nothing"):
        resolve("", field="tokenizer")


def test_a_revision_belongs_to_an_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.revision belongs to a Hugging Face id, .* got 'main'"):
        resolve(str(tmp_path), "main")
    with pytest.raises(UserError, match=r"model\.revision belongs to a Hugging Face id"):
        resolve("package:gemma3-270m", "main", "gemma")


def test_a_packaged_checkpoint_is_given_to_those_who_accept_its_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gemma3-270m/LICENSE-gemma.html").write_text("terms")
    monkeypatch.setattr("hasten.packaged.checkpoint", lambda name: tmp_path / name)
    for given in ("", "mit", "Gemma"):
        with pytest.raises(UserError) as error:
            resolve("package:gemma3-270m", accept_licence=given, field="tokenizer")
        assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in str(error.value)
        assert f"tokenizer.accept_licence=gemma to accept them, got {given!r}" in str(error.value)
    assert capsys.readouterr().err == ""
    assert resolve("package:gemma3-270m", accept_licence="gemma") == tmp_path / "gemma3-270m"
    assert capsys.readouterr().err == (
        "package:gemma3-270m: Gemma Terms of Use accepted (https://ai.google.dev/gemma/terms); with it came "
        f"{tmp_path}/gemma3-270m/LICENSE-gemma.html\n"
    )


def test_a_package_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="must be one of gemma3-270m, got 'nothing'"):
        resolve("package:nothing")


def test_licence_files_are_known_by_how_their_names_begin(tmp_path: Path) -> None:
    names = ["LICENSE", "license.txt", "LICENCE.md", "Notice", "USE_POLICY.md", "COPYING.LESSER"]
    for name in [*names, "README.md", "config.json"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "LICENSES").mkdir()
    for name in ("notice.safetensors", "LICENSE.bin", "license.py"):
        (tmp_path / name).write_text("no licence")
    (tmp_path / "LICENSE-large").write_bytes(b"x" * (2**20 + 1))
    assert [path.name for path in licence_files(tmp_path)] == sorted(names)


def test_a_licence_never_takes_the_place_of_another(tmp_path: Path) -> None:
    for folder, text in (("model", "one"), ("tokenizer", "another")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "LICENSE").write_text(text)
        (tmp_path / folder / "NOTICE").write_text("the same")
    copy_licences(tmp_path / "model", tmp_path / "tokenizer")
    assert {path.name: path.read_text() for path in (tmp_path / "tokenizer").iterdir()} == {
        "LICENSE": "one",
        "LICENSE.tokenizer": "another",
        "NOTICE": "the same",
    }


def test_a_file_is_never_taken_through_a_link_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for folder in ("model", "snapshots/abc", "blobs", "target"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "blobs/1").write_text("terms")
    (tmp_path / "model/terms.txt").write_text("terms")
    (tmp_path / "model/NOTICE").symlink_to("terms.txt")
    (tmp_path / "snapshots/abc/LICENSE").symlink_to("../../blobs/1")
    copy_licences(tmp_path / "model", tmp_path / "target")
    copy_licences(tmp_path / "snapshots/abc", tmp_path / "target")
    assert {path.name: path.read_text() for path in (tmp_path / "target").iterdir()} == {
        "LICENSE": "terms",
        "NOTICE": "terms",
    }
    for folder, there in (("model", "../secret"), ("model", "../blobs/1"), ("snapshots/abc", "../../secret")):
        (tmp_path / folder / "COPYING").symlink_to(there)
        with pytest.raises(UserError, match="COPYING must be a file of its folder, got a link to"):
            copy_licences(tmp_path / folder, tmp_path / "target")
        (tmp_path / folder / "COPYING").unlink()
    assert not (tmp_path / "target/COPYING").exists()
