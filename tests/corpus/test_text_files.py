import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hasten.corpus.text_files import TextFiles, Unit
from hasten.errors import UserError


def texts(source: TextFiles) -> list[str]:
    return [document.text for document in source.documents()]


def test_paragraphs_lines_and_files_can_be_the_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n", encoding="utf-8")
    assert texts(TextFiles(paths=[str(path)])) == ["one\ntwo", "three"]
    assert texts(TextFiles(paths=[str(path)], unit=Unit.line)) == ["one", "two", "three"]
    assert texts(TextFiles(paths=[str(path)], unit=Unit.file)) == ["one\ntwo\n\n\nthree"]


def test_compressed_text_reads_like_plain_text(tmp_path: Path) -> None:
    data = "你好\n\nworld\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data, mtime=0))
    # Two frames, as parallel compressors write them.
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.txt.zst").write_bytes(compress(data[:9]) + compress(data[9:]))
    assert texts(TextFiles(paths=[str(tmp_path / "*")])) == ["你好", "world"] * 3


def test_json_lines_and_parquet_have_text_and_language_fields(tmp_path: Path) -> None:
    rows = [{"body": "hello", "lang": "en"}, {"body": "你好", "lang": "zh"}, {"body": "salut", "lang": None}]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl.zst", "b.parquet"):
        source = TextFiles(paths=[str(tmp_path / name)], text_field="body", language_field="lang", language="fr")
        found = [(document.language, document.text) for document in source.documents()]
        assert found == [("en", "hello"), ("zh", "你好"), ("fr", "salut")]


def test_a_long_document_goes_on_under_the_same_id(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("abcdefgh", encoding="utf-8")
    parts = list(TextFiles(paths=[str(path)], unit=Unit.file, max_characters=3).documents())
    assert [part.text for part in parts] == ["abc", "def", "gh"]
    assert len({part.id for part in parts}) == 1


def test_ids_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    ids = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text", encoding="utf-8")
        ids += [document.id for document in TextFiles(paths=[str(tmp_path / folder / "*.txt")]).documents()]
    assert ids[0] == ids[1]


def test_a_file_matched_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    assert texts(TextFiles(paths=[str(tmp_path / "*.txt"), str(tmp_path / "a.txt")])) == ["text"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"x", r"must be \.txt, \.jsonl"),
        ("a.parquet.gz", b"x", r"must be \.txt, \.jsonl"),
        ("a.txt", b"\xff\xfe", "cannot read"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.txt.gz", gzip.compress(b"some text\n" * 100, mtime=0)[:-12], "cannot read"),
        ("a.txt.zst", b"not zstandard", "cannot read"),
        ("a.jsonl", b"{", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"other": 1}', "must have a text in field 'text', got None"),
        ("a.jsonl", b"[1]", "must have a text in field 'text'"),
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(TextFiles(paths=[str(tmp_path / name)]))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(UserError, match=r"lacks \['text'\]"):
        texts(TextFiles(paths=[str(path)]))


def test_paths_that_match_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one file"):
        texts(TextFiles())
    with pytest.raises(UserError, match="which matches none"):
        texts(TextFiles(paths=[str(tmp_path / "none*.txt")]))
    with pytest.raises(UserError, match="max_characters must be at least 1"):
        TextFiles(max_characters=0)
