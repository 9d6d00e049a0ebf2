"""What a task is: items with a prompt and an expected completion, and a way to score an output.

Every engine is scored the same way: the prompt goes in as token ids, a short greedy completion
comes out until the end-of-text token, its text is scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Item:
    """One question.

    id: unique within its task. cluster: items that are not independent share one (a conversation).
    language: ISO 639-1 code. prompt, expected: the exact text around the model's turn; `expected`
    carries the leading space (if any) that separates it from the prompt.
    """

    id: str
    cluster: str
    language: str
    prompt: str
    expected: str


@dataclass
class Task(ABC):
    """Options every task has: the most items per split (0 = all there are)."""

    train_items: int = 0
    validation_items: int = 400
    test_items: int = 800

    def __post_init__(self) -> None:
        for field in ("train_items", "validation_items", "test_items"):
            if getattr(self, field) < 0:
                raise UserError(f"{field} must be 0 (all) or more, got {getattr(self, field)}")

    @abstractmethod
    def items(self, split: str) -> Iterator[Item]:
        """The items of a split (`train`, `validation`, `test`), in an order that never changes.

        Splits are disjoint by text and by cluster.
        """

    def score(self, output: str, item: Item) -> float:
        """1.0 if the output is right, 0.0 if it is not (exact match of the stripped text)."""
        return float(output.strip() == item.expected.strip())

    def protected(self, item: Item) -> list[str]:
        """The texts of a validation or test item that must not appear in pre-training text: by default its prompt."""
        return [item.prompt]

    def choices(self, item: Item) -> tuple[str, dict[str, str]] | None:
        """For items that choose between texts: the text before the choice, and each option's text by completion."""
        return None
