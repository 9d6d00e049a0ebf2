"""Which split an item belongs to, decided by a hash of its cluster and nothing else.

A new item never moves an old one to another split, and the order in which a file lists its items
does not matter. Items of one cluster always stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from hasten.corpus.text import compact, uniform
from hasten.errors import one_of
from hasten.task.base import SPLITS, Item

VALIDATION_FRACTION = 0.10
TEST_FRACTION = 0.15


def split_of(cluster: str) -> str:
    """`test` for 15% of clusters, `validation` for 10%, `train` for the rest."""
    position = uniform(f"split:{cluster}")
    if position < TEST_FRACTION:
        return "test"
    return "validation" if position < TEST_FRACTION + VALIDATION_FRACTION else "train"


def choose(items: Iterable[Item], split: str, limit: int) -> Iterator[Item]:
    """The first `limit` items of a split (0 = all) in the order of a hash of their ids."""
    if split not in SPLITS:
        raise one_of("split", split, SPLITS)
    chosen = sorted(
        (item for item in items if split_of(item.cluster) == split), key=lambda item: (uniform(item.id), item.id)
    )
    yield from islice(chosen, limit or None)


def unambiguous(labelled: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Distinct (text, label) pairs by the text's compact form; texts that carry two labels are dropped.

    Texts that differ only in case, punctuation or spacing count as one, so that no near copy of a
    test item is left in another split.
    """
    found: dict[str, tuple[str, str]] = {}
    conflicting: set[str] = set()
    for text, label in labelled:
        key = compact(text)
        if found.setdefault(key, (text, label))[1] != label:
            conflicting.add(key)
    return {key: pair for key, pair in found.items() if key and key not in conflicting}
