from pathlib import Path

import numpy as np
import pytest

from hasten.artifacts import Tokens, write_json
from hasten.corpus.base import Document, Source
from hasten.corpus.collect import Spool, collect
from hasten.corpus.decontaminate import Screen, passages
from hasten.corpus.tokenise import remaining, tokenise
from hasten.tokenizer.base import TrainingText, load_tokenizer
from hasten.tokenizer.bpe import Bpe
from tests.corpus.test_collect import Listed

DOCUMENTS = [
    Document(f"{n}", "zh" if n % 3 else "en", f"文件{n} 号 <|eos|> number {n}\n" * (n % 7 + 1)) for n in range(60)
]
FEW = [Document("a", "zh", "又一个来源"), Document("b", "en", "another source")]


def quiet(count: int) -> None:
    """No progress bar."""


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    sources: dict[str, Source] = {"listed": Listed(listed=DOCUMENTS), "few": Listed(listed=FEW)}
    screen, folder = Screen.against([]), tmp_path / "spool"
    return collect(sources, screen, set(), folder, validation_fraction=0.3, seed=0, workers=1, advance=quiet)


@pytest.fixture
def tokenizer(tmp_path: Path, spool: Spool) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Bpe(vocabulary=300).build(TrainingText(dict(spool.train_bytes), spool.training_text), folder)
    return folder


def write(folder: Path, spool: Spool, tokenizer: Path, workers: int = 1) -> Tokens:
    folder.mkdir()
    described = tokenise(spool, tokenizer, folder, workers=workers, advance=quiet)
    write_json(folder / "manifest.json", {"schema": 1, **described})
    return Tokens(folder)


def test_documents_come_back_whole_between_their_marks(tmp_path: Path, spool: Spool, tokenizer: Path) -> None:
    tokens = write(tmp_path / "tokens", spool, tokenizer)
    loaded = load_tokenizer(tokenizer)
    for split in ("train", "validation"):
        ids, offsets = tokens.ids(split), tokens.offsets(split)
        expected = [document for document in spool if document.split == split]
        assert len(offsets) == len(expected) + 1
        assert offsets[-1] == len(ids)
        for i, document in enumerate(expected):
            piece = ids[offsets[i] : offsets[i + 1]].tolist()
            assert (piece[0], piece[-1]) == (loaded.bos_id, loaded.eos_id)
            assert loaded.eos_id not in piece[1:-1]  # the text's own "<|eos|>" is only text
            assert loaded.decode(piece) == document.text
            assert tokens.manifest["languages"][tokens.languages(split)[i]] == document.language


def test_the_manifest_counts_documents_tokens_and_bytes(tmp_path: Path, spool: Spool, tokenizer: Path) -> None:
    tokens = write(tmp_path / "tokens", spool, tokenizer)
    assert tokens.manifest["dtype"] == "uint16"
    for split, by_language in tokens.manifest["splits"].items():
        assert sum(count["tokens"] for count in by_language.values()) == len(tokens.ids(split))
        for language, count in by_language.items():
            texts = [d.text for d in spool if (d.split, d.language) == (split, language)]
            assert count["documents"] == len(texts)
            assert count["bytes"] == sum(len(text.encode()) for text in texts)


def test_each_group_lies_in_one_piece_and_the_manifest_says_where(
    tmp_path: Path, spool: Spool, tokenizer: Path
) -> None:
    tokens, loaded = write(tmp_path / "tokens", spool, tokenizer), load_tokenizer(tokenizer)
    names = [("listed", "en"), ("listed", "zh"), ("few", "en"), ("few", "zh")]
    assert [(group["source"], group["language"]) for group in tokens.manifest["groups"]] == names
    for split in ("train", "validation"):
        offsets, documents = tokens.offsets(split), 0
        present = {(group.source, group.language): group for group in tokens.groups(split)}
        assert list(present) == [name for name in names if any((d.split, d.group) == (split, name) for d in spool)]
        for group in tokens.manifest["groups"]:
            facts, name = group["splits"][split], (group["source"], group["language"])
            texts = [d.text for d in spool if (d.split, d.group) == (split, name)]
            assert (facts["first_document"], facts["documents"]) == (documents, len(texts))
            assert facts["bytes"] == sum(len(text.encode()) for text in texts)
            documents += len(texts)
            if texts:
                own = present[name]
                assert own.start_token == offsets[facts["first_document"]]
                assert own.start_token + own.tokens == offsets[documents]
                ids = tokens.ids(split)[own.start_token : own.start_token + own.tokens]
                assert loaded.decode(ids.tolist()) == "".join(texts)
        assert documents == len(offsets) - 1


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, spool: Spool, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.corpus.collect.CHUNK_CHARACTERS", 1000)
    assert write(tmp_path / "one", spool, tokenizer, 1).hash == write(tmp_path / "two", spool, tokenizer, 2).hash


def test_the_final_check_reads_the_tokens_back(
    tmp_path: Path, spool: Spool, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.corpus.tokenise.VERIFIED_TOKENS", 50)
    tokens = write(tmp_path / "tokens", spool, tokenizer)
    counted: list[int] = []

    def left(text: str) -> set[tuple[str, ...]]:
        return remaining(tokens.path, tokenizer, "uint16", passages(text), workers=1, advance=counted.append)

    assert left("number 5 文件5 号 eos number 5")
    assert sum(counted) == len(DOCUMENTS) + len(FEW)
    assert not left("nothing of the kind is written there")


def test_a_large_vocabulary_gets_wide_ids(tmp_path: Path, spool: Spool, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.add_tokens([f"<extra{n}>" for n in range(2**16)])
    backend.save(str(tokenizer / "tokenizer.json"))
    tokens = write(tmp_path / "tokens", spool, tokenizer)
    assert tokens.ids("train").dtype == np.uint32
