"""Any data set that the `datasets` library opens: an id on the Hub, or a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hasten.corpus.base import Document, Source
from hasten.errors import UserError


@dataclass
class Huggingface(Source):
    """dataset: id or folder (of data files, or of `save_to_disk`). subset, revision: empty means the default.

    split: as `datasets` spells it, for example `train` or `train[:1%]`. text_field: the column with the
    text. id_field: the column that names a document (documents of one name stay in one split); empty
    means its position. language: of documents that do not say; language_field: the column that does.
    streaming: read as it downloads, for data larger than the disk.
    """

    dataset: str = ""
    subset: str = ""
    revision: str = ""
    split: str = "train"
    text_field: str = "text"
    id_field: str = ""
    language: str = "en"
    language_field: str = ""
    streaming: bool = True

    def documents(self) -> Iterator[Document]:
        if not self.dataset:
            raise UserError("huggingface.dataset must be a data set id or a folder, got nothing")
        for index, row in enumerate(islice(self._rows(), self.limit_documents or None)):
            identifier = self._field(row, self.id_field) if self.id_field else index
            language = self._field(row, self.language_field) if self.language_field else None
            text = self._field(row, self.text_field)
            if not isinstance(text, str):
                raise UserError(
                    f"huggingface.text_field must name a column of texts, got {self.text_field!r}: {text!r}"
                )
            yield Document(f"{self.dataset}/{identifier}", str(language or self.language), text)

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._open()
        except UserError:
            raise
        except Exception as error:  # the library raises its own, requests', pyarrow's and fsspec's errors
            raise UserError(f"cannot read data set {self.dataset!r}, split {self.split!r}: {error}") from None

    def _open(self) -> Any:
        import datasets

        if (Path(self.dataset) / "dataset_info.json").is_file():
            return datasets.load_from_disk(self.dataset)
        if (Path(self.dataset) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(self.dataset)[self.split]
        return datasets.load_dataset(
            self.dataset,
            self.subset or None,
            revision=self.revision or None,
            split=self.split,
            streaming=self.streaming,
        )

    def _field(self, row: dict[str, Any], name: str) -> Any:
        if name not in row:
            raise UserError(f"data set {self.dataset!r} must have the column {name!r}, it has {sorted(row)}")
        return row[name]
