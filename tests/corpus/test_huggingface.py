import json
from pathlib import Path

import pytest

from hasten.corpus.huggingface import Huggingface
from hasten.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> str:
    rows = [{"body": "one", "lang": "en", "name": "x"}, {"body": "二", "lang": "zh", "name": "y"}]
    (tmp_path / "data").mkdir()
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "data" / "train.jsonl").write_text(lines, encoding="utf-8")
    return str(tmp_path / "data")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_folder_is_read(folder: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = Huggingface(dataset=folder, text_field="body", language_field="lang", id_field="name", streaming=streaming)
    assert [(d.language, d.text, d.id.rsplit("/", 1)[-1]) for d in source.documents()] == [
        ("en", "one", "x"),
        ("zh", "二", "y"),
    ]
    source.limit_documents = 1
    assert len(list(source.documents())) == 1


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert [d.text for d in Huggingface(dataset=str(tmp_path / "saved")).documents()] == ["a", "b"]


def test_what_cannot_be_read_is_named(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must have the column 'text', it has"):
        list(Huggingface(dataset=folder).documents())
    with pytest.raises(UserError, match="got nothing"):
        list(Huggingface().documents())
    with pytest.raises(UserError, match="cannot read data set"):
        list(Huggingface(dataset=str(tmp_path / "absent")).documents())
