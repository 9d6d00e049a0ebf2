"""First pass over the sources: screen, de-duplicate, split, and spool what is kept to disk."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from hasten.corpus.base import Document, Source
from hasten.corpus.decontaminate import Screen
from hasten.corpus.parallel import ordered_map
from hasten.corpus.text import uniform, valid

CHUNK_CHARACTERS = 1_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class Spooled:
    """A document that is kept, without its id."""

    split: str
    language: str
    text: str


@dataclass
class Spool:
    """Kept documents in one file, in order, and what is known about them.

    counts: per source, documents `read`, `kept`, and dropped as `empty`, `duplicate`, `held_out` (a task
    item is made of it) or `contaminated` (it holds the text of a task item). documents: kept, by split.
    train_bytes: UTF-8, by language.
    """

    path: Path
    documents: Counter[str] = field(default_factory=Counter)
    train_bytes: Counter[str] = field(default_factory=Counter)
    languages: set[str] = field(default_factory=set)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Spooled]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield Spooled(*json.loads(line))

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
    path: Path,
    *,
    validation_fraction: float,
    seed: int,
    workers: int,
    advance: Callable[[int], None],
) -> Spool:
    """Read every source once and write what is kept to `path`.

    A document's split is decided by a hash of its id and `seed`. Memory: a few chunks, and eight
    bytes of hash per distinct document (as a Python set, about 60).
    """
    spool = Spool(path, counts={name: Counter() for name in sources})
    seen: set[int] = set()
    stream = ((name, document) for name, source in sources.items() for document in source.documents())
    screened = ordered_map(_Screening(screen), chunks(stream, lambda pair: len(pair[1].text)), workers)
    with path.open("w", encoding="utf-8") as file:
        for chunk in screened:
            for name, document, contaminated in chunk:
                fate = _fate(document, held_out, contaminated, seen)
                spool.counts[name].update(["read", fate])
                if fate != "kept":
                    continue
                split = "validation" if uniform(f"{seed}:{document.id}") < validation_fraction else "train"
                file.write(json.dumps([split, document.language, document.text], ensure_ascii=False) + "\n")
                spool.documents[split] += 1
                spool.languages.add(document.language)
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
