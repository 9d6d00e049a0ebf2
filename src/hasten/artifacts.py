"""The nouns on disk: tokens, checkpoints, variants, measurements.

Every artifact is a directory (or a JSON file) that describes itself: `manifest.json` holds the
schema version, the kind and whatever a reader needs, so nobody sniffs file names. Artifacts are
written to a temporary sibling and renamed, so a half-written one is never seen, and their bytes
hold no times, host names or run ids: the same work gives the same bytes, which is what lets DVC
skip it.

Checkpoints are Hugging Face directories (`config.json`, `model.safetensors`, `tokenizer.json`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

SCHEMA = 1
FULL_BYTES = 2**16
"""A disk with less free space than this is full: a short write there needs no other explanation."""
Json = dict[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write a file or directory into.

    On success it is renamed onto `path` (replacing what was there), on any error it is removed and
    `path` stays as it was. Raises `UserError` if the disk is full.
    """
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}") for _ in range(2))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written to replace {path}")
        if path.is_dir() or (path.exists() and temporary.is_dir()):
            path.replace(old)  # aside before it is deleted: a kill must not leave half of it in place
        temporary.replace(path)
    except Exception as error:
        if disk_is_full(error, path.parent):
            raise UserError(f"{path} could not be written: no space left on the device") from error
        raise
    finally:
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def disk_is_full(error: Exception, folder: Path) -> bool:
    """Whether that is what an error of writing into `folder` means.

    Python says it with a number, libraries written in Rust (safetensors, tokenizers) in words, numpy not at all.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full):
        return True
    short_write = isinstance(error, OSError) and error.errno is None
    return short_write and folder.is_dir() and shutil.disk_usage(folder).free < FULL_BYTES


def read_json(path: Path) -> Json:
    """The object in a JSON file. Raises `UserError` if it is missing, malformed or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, endless numbers, endless nesting
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Json) -> None:
    """Write `value` atomically, readable by people, stable under diff. NaN is refused (`ValueError`)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes, or of a directory's relative names and bytes."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    total = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file_path.relative_to(path).as_posix()}\0{digest(file_path)}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A directory with a `manifest.json`."""

    path: Path

    @cached_property
    def manifest(self) -> Json:
        """What the artifact says about itself. Raises `UserError` if it is missing or of another schema."""
        manifest = read_json(self.path / "manifest.json")
        if manifest.get("schema") != SCHEMA:
            raise UserError(f"{self.path}/manifest.json has schema {manifest.get('schema')!r}, expected {SCHEMA}")
        return manifest

    @cached_property
    def hash(self) -> str:
        """sha256 of the whole artifact."""
        return digest(self.path)


@dataclass(frozen=True)
class Group:
    """The tokens of a split that are of one source and one language: `tokens` of them from `start_token` on."""

    source: str
    language: str
    start_token: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.source}/{self.language}"


class Tokens(Artifact):
    """Tokenised corpora, memory-mapped: documents one after another, each starting at an offset.

    Per split (`train`, `validation`): `<split>.bin` (token ids, dtype in the manifest),
    `<split>.offsets.npy` (documents + 1, int64) and `<split>.languages.npy` (documents, uint8, an
    index into `manifest["languages"]`). Documents are ordered by group (source, then language), of which the
    manifest says how many documents, tokens and bytes each split has.
    """

    def ids(self, split: str) -> np.ndarray:
        """All token ids of a split, (tokens,), read-only memory map."""
        import numpy as np

        dtype = np.dtype(self.manifest["dtype"])

        def read(path: Path) -> np.ndarray:
            return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

        return self._read(f"{split}.bin", read)

    def offsets(self, split: str) -> np.ndarray:
        """Where each document starts, (documents + 1,); the last entry is the number of tokens."""
        import numpy as np

        return self._read(f"{split}.offsets.npy", lambda path: np.load(path, mmap_mode="r"))

    def languages(self, split: str) -> np.ndarray:
        """Each document's language, (documents,), as an index into `manifest["languages"]`."""
        import numpy as np

        return self._read(f"{split}.languages.npy", lambda path: np.load(path, mmap_mode="r"))

    def groups(self, split: str) -> list[Group]:
        """The groups of a split that have tokens, in the order in which they lie there.

        Raises `UserError` for tokens of a version that did not order them.
        """
        if "groups" not in self.manifest:
            raise UserError(
                f"{self.path}/manifest.json must name its groups: these tokens are old, run `prepare` again"
            )
        found: list[Group] = []
        start = 0
        for group in self.manifest["groups"]:
            size = int(group["splits"][split]["tokens"])
            if size:
                found.append(Group(group["source"], group["language"], start, size))
            start += size
        return found

    def _read(self, name: str, read: Callable[[Path], np.ndarray]) -> np.ndarray:
        try:
            return read(self.path / name)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / name} is not a readable token file: {error}") from None


@dataclass(frozen=True)
class Place:
    """Where a safetensors file has a tensor: its first byte, counted from the file's start, its type and shape."""

    start_byte: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Stored(Mapping[str, "torch.Tensor"]):
    """The tensors of a safetensors file, each read anew whenever it is asked for, into memory of its own: what is held
    is what the caller keeps. The file is not mapped, so that no page of it counts as the process's.
    """

    path: Path
    places: Mapping[str, Place]

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        with unreadable(self.path), self.path.open("rb") as file:
            file.seek(place.start_byte)
            if file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                raise EOFError(f"it ends within {name}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # without reading it

    def with_copy(self, name: str, of: str) -> Stored:
        """The same, with a tensor under a second name, the last."""
        return Stored(self.path, {**self.places, name: self.places[of]})


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Raises `UserError` where a file turns out to be no safetensors."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


class Checkpoint(Artifact):
    """A model as a Hugging Face directory."""

    @cached_property
    def config(self) -> Json:
        """`config.json`."""
        return read_json(self.path / "config.json")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of `model.safetensors`, on the CPU: views of the file, read where they are touched, and what was
        read counts as memory of the process as long as any of them is held.

        Raises `UserError` if the file is missing or corrupt.
        """
        from safetensors import safe_open

        path = self.weights_file
        with unreadable(path), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def stored(self) -> Stored:
        """The same tensors, read one by one. Raises `UserError` as `tensors`."""
        path, views = self.weights_file, self.tensors()  # checks the file, too
        with path.open("rb") as file:
            header = json.loads(file.read(size := int.from_bytes(file.read(8), "little")))
        starts = {name: 8 + size + header[name]["data_offsets"][0] for name in views}
        return Stored(path, {name: Place(starts[name], value.dtype, value.shape) for name, value in views.items()})

    @property
    def weights_file(self) -> Path:
        """`model.safetensors`. Raises `UserError` if it is missing."""
        path = self.path / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{path} does not exist; a checkpoint holds config.json and model.safetensors")
        return path

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(p.stat().st_size for p in self.path.glob("*.safetensors"))


class Variant(Checkpoint):
    """A checkpoint that one compression method made from a parent.

    Its manifest adds `name`, `method`, `options`, `lineage` (names from the first ancestor to itself),
    `parent` (hash) and `grid` (bits, group_size, symmetric of its integers, `type` of 8-bit floats; or `groups` of
    such, each with the `matrices` that lie on it; null if float).
    """

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def lineage(self) -> list[str]:
        return list(self.manifest["lineage"])


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, as a `Variant` if its manifest says so. Raises `UserError` if there is none."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a checkpoint: it has no config.json")
    checkpoint = Checkpoint(path)
    return Variant(path) if checkpoint.manifest.get("kind") == "variant" else checkpoint
