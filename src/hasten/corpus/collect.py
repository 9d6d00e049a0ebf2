"""First pass over the sources: screen, de-duplicate, split, and spool what is kept to disk.

What is kept lies in one file per group, which is a source and a language. Read one file after another, documents come
ordered by group however a source mixes its languages, and nothing had to be sorted: training can then draw from each
group as often as it is told to.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO, TypeVar

from hasten.corpus.base import Document, Source
from hasten.corpus.decontaminate import Screen
from hasten.corpus.parallel import ordered_map
from hasten.corpus.text import uniform, valid
from hasten.errors import UserError

CHUNK_CHARACTERS = 1_000_000
MOST_LANGUAGES = 256
"""A document's language is one byte on disk, and each language of a source an open file."""
T = TypeVar("T")


@dataclass(frozen=True)
class Spooled:
    """A document that is kept, without its id."""

    split: str
    source: str
    language: str
    text: str

    @property
    def group(self) -> tuple[str, str]:
        return self.source, self.language


@dataclass
class Spool:
    """Kept documents, ordered by group and as they were read within one, and what is known about them.

    counts: per source, documents `read`, `kept`, and dropped as `empty`, `duplicate`, `held_out` (a task
    item is made of it) or `contaminated` (it holds the text of a task item). documents: kept, by split.
    train_bytes: UTF-8, by language.
    """

    folder: Path
    documents: Counter[str] = field(default_factory=Counter)
    train_bytes: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    files: dict[tuple[str, str], Path] = field(default_factory=dict)
    """By group, in the order in which their first documents were read."""

    @property
    def languages(self) -> list[str]:
        return sorted({language for _, language in self.files})

    @property
    def groups(self) -> list[tuple[str, str]]:
        """(source, language), in the sources' order, languages sorted."""
        return sorted(self.files, key=lambda group: (list(self.counts).index(group[0]), group[1]))

    def __iter__(self) -> Iterator[Spooled]:
        for group in self.groups:
            with self.files[group].open(encoding="utf-8") as lines:
                for line in lines:
                    split, text = json.loads(line)
                    yield Spooled(split, *group, text)

    def training_text(self) -> Iterator[tuple[str, str]]:
        """(language, text) of the training documents."""
        return ((document.language, document.text) for document in self if document.split == "train")


def chunks(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items that hold about a million characters, however long or short the items are."""
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += characters(item) + 100  # so that a million empty items are not one chunk
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Writer(ExitStack):
    """The files of the source that is being read. Sources come one after another, so the last one's are closed."""

    def __init__(self, spool: Spool) -> None:
        super().__init__()
        self.spool, self.source = spool, ""
        self.open: dict[str, TextIO] = {}

    def write(self, document: Spooled) -> None:
        if document.source != self.source:
            self.close()
            self.source, self.open = document.source, {}
        if document.language not in self.open:
            # By number: a language is whatever a column of somebody's file says.
            path = self.spool.folder / f"{len(self.spool.files)}.jsonl"
            self.spool.files[document.group] = path
            if len(languages := self.spool.languages) > MOST_LANGUAGES:
                raise UserError(
                    f"a corpus may have at most {MOST_LANGUAGES} languages; source {document.source} adds "
                    f"{document.language!r} to {', '.join(languages[:3])}, ...: see its language_field"
                )
            self.open[document.language] = self.enter_context(path.open("w", encoding="utf-8"))
        line = json.dumps([document.split, document.text], ensure_ascii=False)
        self.open[document.language].write(f"{line}\n")


@dataclass(frozen=True)
class _Screening:
    """What runs in the workers: each document, made valid Unicode, with whether it is contaminated."""

    screen: Screen

    def __call__(self, chunk: list[tuple[str, Document]]) -> list[tuple[str, Document, bool]]:
        cleaned = ((source, replace(document, text=valid(document.text))) for source, document in chunk)
        return [(source, document, self.screen.hits(document.text)) for source, document in cleaned]


def collect(
    sources: dict[str, Source],
    screen: Screen,
    held_out: set[str],
    folder: Path,
    *,
    validation_fraction: float,
    seed: int,
    workers: int,
    advance: Callable[[int], None],
) -> Spool:
    """Read every source once and write what is kept into `folder`, which must not exist.

    A document's split is decided by a hash of its id and `seed`. Memory: a few chunks, and eight
    bytes of hash per distinct document (as a Python set, about 60).
    """
    folder.mkdir()
    spool = Spool(folder, counts={name: Counter() for name in sources})
    seen: set[int] = set()
    stream = ((name, document) for name, source in sources.items() for document in source.documents())
    screened = ordered_map(_Screening(screen), chunks(stream, lambda pair: len(pair[1].text)), workers)
    with _Writer(spool) as files:
        for chunk in screened:
            for name, document, contaminated in chunk:
                fate = _fate(document, held_out, contaminated, seen)
                spool.counts[name].update(["read", fate])
                if fate != "kept":
                    continue
                split = "validation" if uniform(f"{seed}:{document.id}") < validation_fraction else "train"
                files.write(Spooled(split, name, document.language, document.text))
                spool.documents[split] += 1
                if split == "train":
                    spool.train_bytes[document.language] += len(document.text.encode())
            advance(len(chunk))
    return spool


def _fate(document: Document, held_out: set[str], contaminated: bool, seen: set[int]) -> str:
    """`kept`, or why it is dropped."""
    text = document.text.strip()
    if not text:
        return "empty"
    if document.id in held_out:
        return "held_out"
    if contaminated:
        return "contaminated"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    if key in seen:
        return "duplicate"
    seen.add(key)
    return "kept"
