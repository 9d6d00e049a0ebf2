"""Your own text: local `.txt`, `.jsonl` and `.parquet` files, also compressed (`.txt`, `.jsonl` with `.gz` or `.zst`).

Files are read as streams, so they may be larger than memory.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from glob import glob
from itertools import islice
from pathlib import Path
from typing import IO, Any

from hasten.corpus.base import Document, Source
from hasten.errors import UserError

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")


class Unit(Enum):
    """What is one document of a `.txt` file."""

    file = "file"
    paragraph = "paragraph"
    line = "line"


@dataclass
class TextFiles(Source):
    """paths: files, or patterns such as `data/**/*.jsonl.zst`. language: of documents that do not say (ISO 639-1).

    unit: what is a document in a `.txt`: the file, a paragraph (lines up to an empty one) or a line.
    max_characters: a `.txt` document that is longer goes on in another one, which stays in the same split.
    text_field, language_field: the fields of a `.jsonl` line, the columns of a `.parquet`; an empty
    language_field means `language` for all.
    """

    paths: list[str] = field(default_factory=list)
    language: str = "en"
    unit: Unit = Unit.paragraph
    max_characters: int = 1_000_000
    text_field: str = "text"
    language_field: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_characters < 1:
            raise UserError(f"text_files.max_characters must be at least 1, got {self.max_characters}")

    def documents(self) -> Iterator[Document]:
        found = (document for path in self.files() for document in self._read(path))
        yield from islice(found, self.limit_documents or None)

    def files(self) -> list[Path]:
        """The files in a stable order. Raises `UserError` if a path matches none or has an unknown format."""
        if not self.paths:
            raise UserError("text_files.paths must name at least one file or pattern, got none")
        files: dict[Path, None] = {}
        for pattern in self.paths:
            matches = [Path(p) for p in sorted(glob(pattern, recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (Path.glob refuses absolute patterns)
            if not matches:
                raise UserError(f"text_files.paths must match files, got {pattern!r}, which matches none")
            files.update(dict.fromkeys(matches))
        for path in files:
            if _format(path) not in FORMATS:
                accepted = f"{', '.join(FORMATS)}, also with {' or '.join(COMPRESSIONS)}"
                raise UserError(f"text_files.paths must be {accepted}, got {path}")
        return list(files)

    def _read(self, path: Path) -> Iterator[Document]:
        readers = {".txt": self._text, ".jsonl": self._jsonl, ".parquet": self._parquet}
        try:
            yield from readers[_format(path)](path)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"text_files cannot read {path}: {error}") from None

    def _text(self, path: Path) -> Iterator[Document]:
        with _lines(path) as lines:
            for index, text in enumerate(self._units(lines)):
                for part in range(0, len(text), self.max_characters):
                    # Parts share the id, so that they share the split.
                    yield Document(_identifier(path, index), self.language, text[part : part + self.max_characters])

    def _units(self, lines: Iterable[str]) -> Iterator[str]:
        gathered: list[str] = []
        size = 0
        for line in lines:
            blank = not line.strip()
            if self.unit is Unit.line:
                if not blank:
                    yield line.rstrip("\r\n")
                continue
            if gathered and self.unit is Unit.paragraph and (blank or size > self.max_characters):
                yield "".join(gathered).strip()
                gathered, size = [], 0
            if not (blank and self.unit is Unit.paragraph):
                gathered.append(line)
                size += len(line)
        if "".join(gathered).strip():
            yield "".join(gathered).strip()

    def _jsonl(self, path: Path) -> Iterator[Document]:
        with _lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}:{number} is not JSON: {error}") from None
                    yield self._document(row, path, number)

    def _parquet(self, path: Path) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        wanted = [name for name in (self.text_field, self.language_field) if name]
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                missing = [name for name in wanted if name not in file.schema_arrow.names]
                if missing:
                    raise UserError(f"{path} must have the columns {wanted}, it lacks {missing}")
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield self._document(row, path, number)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a readable Parquet file: {error}") from None

    def _document(self, row: Any, path: Path, number: int) -> Document:
        text = row.get(self.text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}:{number} must have a text in field {self.text_field!r}, got {text!r}")
        language = row.get(self.language_field) if self.language_field else None
        return Document(_identifier(path, number), str(language or self.language), text)


def _identifier(path: Path, index: int) -> str:
    """Without the folder, so that a copy of the data elsewhere is split the same way."""
    return f"text_files/{path.name}#{index}"


def _format(path: Path) -> str:
    """`.jsonl` for `a.jsonl`, `a.jsonl.gz` and `a.jsonl.zst`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if inner != ".parquet" else "compressed .parquet"
    return suffixes[-1] if suffixes else ""


@contextmanager
def _lines(path: Path) -> Iterator[IO[str]]:
    """A text file's lines, decompressed on the way."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import zstandard

        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
            try:
                with io.TextIOWrapper(stream, encoding="utf-8") as lines:
                    yield lines
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
    elif suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield lines
    else:
        with path.open(encoding="utf-8-sig") as lines:
            yield lines
