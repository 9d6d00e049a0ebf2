import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hasten.corpus.base import Document, Source
from hasten.corpus.collect import CHUNK_CHARACTERS, Spool, chunks, collect
from hasten.corpus.decontaminate import Screen, passages

ITEM = "this sentence is what the task asks"


@dataclass
class Listed(Source):
    listed: list[Document] = field(default_factory=list)

    def documents(self) -> Iterator[Document]:
        yield from self.listed


def gather(tmp_path: Path, documents: list[Document], held_out: set[str], seed: int = 0) -> Spool:
    return collect(
        {"listed": Listed(listed=documents)},
        Screen.against(passages(ITEM)),
        held_out,
        tmp_path / "spool.jsonl",
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
    assert [document.text for document in spool] == ["first text\nwith two lines", "第二篇", "broken ? surrogate"]
    assert spool.languages == {"en", "zh"}
    trained = [(document.language, document.text) for document in spool if document.split == "train"]
    assert list(spool.training_text()) == trained
    assert spool.train_bytes.total() == sum(len(text.encode()) for _, text in trained)


def test_the_split_depends_on_id_and_seed_only(tmp_path: Path) -> None:
    def splits(documents: list[Document], seed: int) -> dict[str, str]:
        gather(tmp_path, documents, set(), seed)
        rows = [json.loads(line) for line in (tmp_path / "spool.jsonl").read_text().splitlines()]
        return {text: split for split, _, text in rows}

    documents = [Document(f"id{n}", "en", f"text {n}") for n in range(200)]
    splitted = splits(documents, 0)
    assert splitted == splits(documents[::-1], 0)
    assert splitted != splits(documents, 1)
    assert 60 < list(splitted.values()).count("validation") < 140
    parts = [Document("same", "en", f"part {n}") for n in range(50)]
    assert len(set(splits(parts, 0).values())) == 1


@given(st.lists(st.integers(0, 3 * CHUNK_CHARACTERS), max_size=30))
def test_chunks_keep_everything_in_order_and_stay_small(sizes: list[int]) -> None:
    parts = list(chunks(sizes, int))
    assert [size for part in parts for size in part] == sizes
    assert all(sum(part[:-1]) < CHUNK_CHARACTERS for part in parts)
