"""What a corpus source is: a stream of documents with an id and a language."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.errors import UserError


@dataclass(frozen=True)
class Document:
    """A piece of text that is never split between training and validation (one conversation, one article)."""

    id: str
    language: str
    text: str


@dataclass
class Source(ABC):
    """Options every source has.

    limit_documents: stop after this many documents; 0 means all of them.
    """

    limit_documents: int = 0

    def __post_init__(self) -> None:
        if self.limit_documents < 0:
            raise UserError(f"limit_documents must be 0 (all) or more, got {self.limit_documents}")

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, in an order that never changes. Raises `UserError` if the text cannot be had."""
