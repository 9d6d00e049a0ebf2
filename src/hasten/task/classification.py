"""What tasks that label one text have in common: a template around the text, and one word per class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hasten.corpus.text import fingerprint, shorten
from hasten.errors import UserError
from hasten.task.base import Item, Task
from hasten.task.splitting import choose, unambiguous


@dataclass
class Classification(Task):
    """max_characters: longer texts are shortened to their beginning; 0 means never."""

    max_characters: int = 0

    before: ClassVar[str]
    after: ClassVar[str]
    """The template: the prompt is `before + text + after`."""
    language: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_characters != 0 and self.max_characters < 8:
            raise UserError(f"max_characters must be 0 (all) or at least 8, got {self.max_characters}")

    @abstractmethod
    def labelled(self) -> Iterator[tuple[str, str]]:
        """(text, completion) pairs as the source has them; duplicates and contradictions are allowed."""

    def items(self, split: str) -> Iterator[Item]:
        limit = getattr(self, f"{split}_items", 0)
        shortened = ((shorten(text, self.max_characters), completion) for text, completion in self.labelled())
        items = (
            Item(name, name, self.language, f"{self.before}{text}{self.after}", completion)
            for key, (text, completion) in unambiguous(shortened).items()
            # Named after the text as the model sees it, so equal prompts cannot be in two splits.
            for name in (fingerprint(key),)
        )
        yield from choose(items, split, limit)

    def protected(self, item: Item) -> list[str]:
        return [item.prompt.removeprefix(self.before).removesuffix(self.after)]
