"""English chat between pairs of people (package `chitchat-dataset`, MIT).

One conversation is one document. Who wrote a message and when is dropped: speakers become `A` and
`B` in the order in which they first speak, messages that one person sends in a row are one turn,
and a turn is one line. Conversations that nobody answered are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hasten.corpus.base import Document, Source
from hasten.packages import CHITCHAT

Turns = list[tuple[str, str]]
"""(speaker, text) in order; speakers are letters."""


def conversations() -> Iterator[tuple[str, Turns]]:
    """Every conversation with at least two turns, as (document id, turns), in the package's order."""
    raw = json.loads(CHITCHAT.read("chitchat_dataset/dataset.json"))
    for key, value in raw.items():
        speakers: dict[str, str] = {}
        turns: Turns = []
        for messages in value["messages"]:
            text = " ".join(" ".join(message["text"].split()) for message in messages).strip()
            if not text:
                continue
            speaker = speakers.setdefault(messages[0]["sender"], chr(ord("A") + len(speakers)))
            if turns and turns[-1][0] == speaker:
                turns[-1] = (speaker, f"{turns[-1][1]} {text}")
            else:
                turns.append((speaker, text))
        if len(turns) > 1:
            yield f"chitchat/{key}", turns


def transcript(turns: Turns) -> str:
    """One line per turn: `A: hello`."""
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


@dataclass
class Chitchat(Source):
    """English conversations, about 4,000."""

    def documents(self) -> Iterator[Document]:
        for identifier, turns in islice(conversations(), self.limit_documents or None):
            yield Document(identifier, "en", transcript(turns))
