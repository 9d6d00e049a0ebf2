"""What a run said of its course, kept until it is finished: points of curves and texts, one JSON line for each call.

A fit that is killed goes on from its checkpoint, in a process that knows nothing of the figures before it. From the
journal it has them again: the record gets whole curves, and the store what the killed process had not sent yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hasten.artifacts import Json


def note(journal: Path, entry: Json) -> None:
    """Append an entry. The line break comes first: what a kill cuts off spoils no line but its own."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(entry))


def entries(journal: Path) -> Iterator[Json]:
    """What is in it, oldest first; nothing if there is none."""
    lines = journal.read_text(encoding="utf-8", errors="replace").splitlines() if journal.is_file() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off, or the empty first one
        if isinstance(entry, dict):
            yield entry
