"""Nothing that a task asks about may be read before: keep validation and test items out of pre-training text.

An item's text counts as present if a passage of it is: the whole text if it has at most 13 units
(words, or single Chinese characters), else any of its consecutive 13-unit passages (GPT-3's length,
Brown et al. 2020, appendix C). Texts of fewer than 6 units are not looked for: they recur by chance
("how are you"). Case, width, punctuation and spacing do not matter. Conversations that items are
made of are held out as a whole by their id, whatever their length (see `prepare`).

`Screen` drops documents before anything is trained. `found` is the proof afterwards, by another
algorithm on the finished tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hasten.corpus.text import units

PASSAGE_UNITS = 13
FEWEST_UNITS = 6
ANCHOR_CHARACTERS = 12


def passages(text: str) -> list[tuple[str, ...]]:
    """The passages of an item's text that must not occur elsewhere; empty if it is too short to look for."""
    words = tuple(units(text))
    if len(words) <= PASSAGE_UNITS:
        return [words] if len(words) >= FEWEST_UNITS else []
    return [words[i : i + PASSAGE_UNITS] for i in range(0, len(words) - PASSAGE_UNITS + 1, PASSAGE_UNITS)]


@dataclass
class Screen:
    """Finds passages in documents, as strings of characters without word boundaries.

    That is stricter than comparing words ("dont" finds "don't"), so whatever `found` could find is
    dropped. Cost: one set of the document's 12-character substrings.
    """

    anchored: dict[str, list[str]] = field(default_factory=dict)
    """Passages by their first characters."""
    short: list[str] = field(default_factory=list)
    """Passages shorter than an anchor."""

    @classmethod
    def against(cls, wanted: Iterable[tuple[str, ...]]) -> Screen:
        screen = cls()
        for passage in sorted({"".join(words) for words in wanted}):
            if len(passage) < ANCHOR_CHARACTERS:
                screen.short.append(passage)
            else:
                screen.anchored.setdefault(passage[:ANCHOR_CHARACTERS], []).append(passage)
        return screen

    def hits(self, text: str) -> bool:
        """Whether any passage occurs in `text`."""
        run = "".join(units(text))
        if any(passage in run for passage in self.short):
            return True
        substrings = {run[i : i + ANCHOR_CHARACTERS] for i in range(len(run) - ANCHOR_CHARACTERS + 1)}
        present = substrings & self.anchored.keys()
        return any(passage in run for anchor in present for passage in self.anchored[anchor])


def found(texts: Iterable[str], wanted: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The passages that occur in `texts` word for word, found by sliding over words. The check on `Screen`."""
    by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for passage in wanted:
        by_start.setdefault(passage[:FEWEST_UNITS], []).append(passage)
    result: set[tuple[str, ...]] = set()
    for text in texts:
        words = tuple(units(text))
        for i in range(len(words) - FEWEST_UNITS + 1):
            for passage in by_start.get(words[i : i + FEWEST_UNITS], ()):
                if words[i : i + len(passage)] == passage:
                    result.add(passage)
    return result
