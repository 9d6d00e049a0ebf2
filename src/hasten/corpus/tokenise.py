"""Second pass: spooled documents to `Tokens` on disk, in parallel, streaming, in the spool's order: group by group."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from hasten.artifacts import Json, Tokens
from hasten.corpus.collect import Spool, Spooled, chunks
from hasten.corpus.decontaminate import found
from hasten.corpus.parallel import ordered_map
from hasten.tokenizer.base import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
VERIFIED_TOKENS = 200_000
"""Tokens per chunk when the finished artifact is read back."""


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk that belong to one split: ids end to end, and one entry per document."""

    split: str
    ids: np.ndarray
    lengths: list[int]
    groups: list[tuple[str, str]]
    bytes: list[int]


@dataclass
class _Encoder:
    """What runs in the workers: `[bos] text [eos]` for each document."""

    folder: Path
    dtype: np.dtype

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder)

    def __call__(self, chunk: list[Spooled]) -> list[Encoded]:
        return [self._encode(split, [d for d in chunk if d.split == split]) for split in SPLITS]

    def _encode(self, split: str, documents: list[Spooled]) -> Encoded:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        sequences = [[bos, *ids, eos] for ids in self.tokenizer.encode_many([d.text for d in documents])]
        return Encoded(
            split=split,
            ids=np.array([i for ids in sequences for i in ids], dtype=self.dtype),
            lengths=[len(ids) for ids in sequences],
            groups=[d.group for d in documents],
            bytes=[len(d.text.encode()) for d in documents],
        )


def tokenise(
    spool: Spool, tokenizer_folder: Path, folder: Path, *, workers: int, advance: Callable[[int], None]
) -> Json:
    """Write the token files of every split into an existing `folder`.

    Returns the manifest's `dtype`, `languages`, `vocab_size`, `splits` (documents, tokens and UTF-8 bytes by
    split and language; tokens count `bos` and `eos`, bytes only text) and `groups` (the same by source and
    language, with each split's first document).
    """
    vocab_size = load_tokenizer(tokenizer_folder).vocab_size
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32).newbyteorder("<")
    languages = spool.languages
    offsets = {split: array("q", [0]) for split in SPLITS}
    codes = {split: array("B") for split in SPLITS}
    counts = {group: {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS} for group in spool.groups}
    with ExitStack() as files:
        bins = {split: files.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        work = chunks(spool, lambda document: len(document.text))
        for chunk in ordered_map(_Encoder(tokenizer_folder, dtype), work, workers):
            for part in chunk:
                bins[part.split].write(part.ids.tobytes())
                for length, group, size in zip(part.lengths, part.groups, part.bytes, strict=True):
                    offsets[part.split].append(offsets[part.split][-1] + length)
                    codes[part.split].append(languages.index(group[1]))
                    counts[group][part.split].update(documents=1, tokens=length, bytes=size)
                advance(len(part.lengths))
    for split in SPLITS:
        np.save(folder / f"{split}.offsets.npy", np.frombuffer(offsets[split], dtype=np.int64))
        np.save(folder / f"{split}.languages.npy", np.frombuffer(codes[split], dtype=np.uint8))
    splits: Json = {split: {} for split in SPLITS}
    groups: list[Json] = []
    first = dict.fromkeys(SPLITS, 0)
    for (source, language), by_split in counts.items():
        within = {split: {"first_document": first[split], **count} for split, count in by_split.items()}
        groups.append({"source": source, "language": language, "splits": within})
        for split, count in by_split.items():
            first[split] += count["documents"]
    for split, language in product(SPLITS, languages):
        own = [by_split[split] for (_, one), by_split in counts.items() if one == language]
        splits[split][language] = {key: sum(count[key] for count in own) for key in ("documents", "tokens", "bytes")}
    facts = {"dtype": dtype.name, "languages": languages, "vocab_size": vocab_size}
    return {**facts, "splits": splits, "groups": groups}


@dataclass
class _Finder:
    """What runs in the workers: the passages that a range of finished documents still holds."""

    tokens: Path
    tokenizer: Path
    wanted: list[tuple[str, ...]]
    dtype: str

    def __call__(self, part: tuple[str, int, int]) -> set[tuple[str, ...]]:
        split, first, last = part
        offsets = np.load(self.tokens / f"{split}.offsets.npy", mmap_mode="r")
        start = int(offsets[first])
        size = int(offsets[last]) - start
        path, dtype = self.tokens / f"{split}.bin", np.dtype(self.dtype)
        ids = np.fromfile(path, dtype=dtype, count=size, offset=start * dtype.itemsize)
        documents = np.split(ids, np.asarray(offsets[first + 1 : last]) - start)
        return found(load_tokenizer(self.tokenizer).decode_many([d.tolist() for d in documents]), self.wanted)


def remaining(
    folder: Path,
    tokenizer_folder: Path,
    dtype: str,
    wanted: list[tuple[str, ...]],
    *,
    workers: int,
    advance: Callable[[int], None],
) -> set[tuple[str, ...]]:
    """The passages that occur in the finished token files, decoded back to text; should be none."""
    parts = list(_parts(folder))
    result: set[tuple[str, ...]] = set()
    finder = _Finder(folder, tokenizer_folder, wanted, dtype)
    for (_, first, last), hits in zip(parts, ordered_map(finder, parts, workers), strict=True):
        result |= hits
        advance(last - first)
    return result


def _parts(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(split, first document, one past the last) so that each part holds about `VERIFIED_TOKENS`."""
    for split in SPLITS:
        offsets = np.load(folder / f"{split}.offsets.npy", mmap_mode="r")
        first, documents = 0, len(offsets) - 1
        while first < documents:
            last = int(np.searchsorted(offsets, offsets[first] + VERIFIED_TOKENS, side="left"))
            last = min(max(last, first + 1), documents)
            yield split, first, last
            first = last


def totals(tokens: Tokens) -> dict[str, int]:
    """Documents, tokens and bytes over all splits and languages."""
    total: Counter[str] = Counter()
    for by_language in tokens.manifest["splits"].values():
        for count in by_language.values():
            total.update(count)
    return dict(total)
