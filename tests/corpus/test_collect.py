from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.corpus.base import Document, Source
from hasten.corpus.collect import CHUNK_CHARACTERS, MOST_LANGUAGES, Spool, chunks, collect
from hasten.corpus.decontaminate import Screen, passages
from hasten.errors import UserError

ITEM = "this sentence is what the task asks"


@dataclass
class Listed(Source):
    listed: list[Document] = field(default_factory=list)

    def documents(self) -> Iterator[Document]:
        yield from self.listed


def gather(
    folder: Path, documents: list[Document], held_out: set[str], seed: int = 0, more: list[Document] | None = None
) -> Spool:
    sources: dict[str, Source] = {"listed": Listed(listed=documents)}
    if more is not None:
        sources["another"] = Listed(listed=more)
    return collect(
        sources,
        Screen.against(passages(ITEM)),
        held_out,
        folder / "spool",
        validation_fraction=0.5,
        seed=seed,
        workers=1,
        advance=lambda count: None,
    )


def test_every_document_meets_one_fate(tmp_path: Path) -> None:
    documents = [
        Document("a", "en", "first text\nwith two lines"),
        Document("b", "en", " "),
        Document("c", "en", "first text\nwith two lines "),
        Document("d", "zh", "第二篇"),
        Document("e", "en", f"He said: {ITEM.upper()}!"),
        Document("f", "en", "held out as a whole"),
        Document("g", "en", "broken \ud800 surrogate"),
    ]
    spool = gather(tmp_path, documents, {"f"})
    assert spool.counts["listed"] == {
        "read": 7, "kept": 3, "empty": 1, "duplicate": 1, "contaminated": 1, "held_out": 1,
    }  # fmt: skip
    assert [document.text for document in spool] == ["first text\nwith two lines", "broken ? surrogate", "第二篇"]
    assert spool.languages == ["en", "zh"]
    trained = [(document.language, document.text) for document in spool if document.split == "train"]
    assert list(spool.training_text()) == trained
    assert spool.train_bytes.total() == sum(len(text.encode()) for _, text in trained)


def test_the_split_depends_on_id_and_seed_only(tmp_path: Path) -> None:
    def splits(documents: list[Document], seed: int) -> dict[str, str]:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return {document.text: document.split for document in gather(folder, documents, set(), seed)}

    numbers = count()

    documents = [Document(f"id{n}", "en", f"text {n}") for n in range(200)]
    splitted = splits(documents, 0)
    assert splitted == splits(documents[::-1], 0)
    assert splitted != splits(documents, 1)
    assert 60 < list(splitted.values()).count("validation") < 140
    parts = [Document("same", "en", f"part {n}") for n in range(50)]
    assert len(set(splits(parts, 0).values())) == 1


def test_documents_come_back_ordered_by_source_then_language_and_as_they_were_read_within(tmp_path: Path) -> None:
    mixed = [Document(f"a{n}", "zh" if n % 3 else "en", f"one {n}") for n in range(30)]
    more = [Document(f"b{n}", ("fr", "en/US", "en")[n % 3], f"other {n}") for n in range(30)]
    spool = gather(tmp_path, mixed, set(), more=more)
    groups = [("listed", "en"), ("listed", "zh"), ("another", "en"), ("another", "en/US"), ("another", "fr")]
    assert spool.groups == groups
    expected = [
        (*group, document.text)
        for group in groups
        for document in (mixed if group[0] == "listed" else more)
        if document.language == group[1]
    ]
    assert [(document.source, document.language, document.text) for document in spool] == expected


def test_more_languages_than_a_byte_counts_are_refused_with_a_hint(tmp_path: Path) -> None:
    documents = [Document(f"{n}", f"text {n} of a column", f"{n}") for n in range(MOST_LANGUAGES + 1)]
    with pytest.raises(UserError, match=r"at most 256 languages; source listed adds 'text 256 of a col.* language_"):
        gather(tmp_path, documents, set())


@given(st.lists(st.integers(0, 3 * CHUNK_CHARACTERS), max_size=30))
def test_chunks_keep_everything_in_order_and_stay_small(sizes: list[int]) -> None:
    parts = list(chunks(sizes, int))
    assert [size for part in parts for size in part] == sizes
    assert all(sum(part[:-1]) < CHUNK_CHARACTERS for part in parts)
