"""Which of four messages really came next in a conversation (package `chitchat-dataset`).

Every item is its own conversation, and the three distractors are the replies of other items of the
same split: nothing but the context tells them apart, and holding out the items' conversations holds
out every text that they show.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hasten.corpus.chitchat import Turns, conversations, transcript
from hasten.corpus.text import shorten, uniform
from hasten.errors import UserError
from hasten.task.base import Item, Task
from hasten.task.splitting import choose

LETTERS = "ABCD"
QUESTION = "\nNext:\n"
ANSWER = "\nAnswer:"
SHORTEST_REPLY_WORDS = 4
DRAWN = 32
"""Other replies looked at for three that differ."""


class Reply(NamedTuple):
    """A turn that can be guessed: the turns before it, and its text."""

    context: Turns
    text: str


@dataclass
class ReplyChoice(Task):
    """context_turns: how many turns are shown; context_characters, option_characters: the most of each turn."""

    context_turns: int = 2
    context_characters: int = 100
    option_characters: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("context_turns", "context_characters", "option_characters"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, got {getattr(self, field)}")

    def items(self, split: str) -> Iterator[Item]:
        replies = {key: reply for key, turns in conversations() if (reply := self._reply(key, turns))}
        blank = (Item(key, key, "en", "", "") for key in replies)
        chosen = [item.id for item in choose(blank, split, getattr(self, f"{split}_items", 0))]
        for key in chosen:
            yield self._item(key, replies, chosen)

    def _reply(self, key: str, turns: Turns) -> Reply | None:
        """One turn of the conversation, drawn by a hash, or None if none is long enough to tell apart."""
        places = [
            place
            for place in range(self.context_turns, len(turns))
            if len(turns[place][1].split()) >= SHORTEST_REPLY_WORDS
        ]
        if not places:
            return None
        place = places[int(uniform(f"reply:{key}") * len(places))]
        context = [
            (speaker, shorten(text, self.context_characters))
            for speaker, text in turns[place - self.context_turns : place]
        ]
        return Reply(context, shorten(turns[place][1], self.option_characters))

    def _item(self, key: str, replies: dict[str, Reply], others: list[str]) -> Item:
        dice = random.Random(key)
        truth = replies[key].text
        drawn = [replies[other].text for other in dice.sample(others, min(DRAWN, len(others)))]
        # Distinct, in the order drawn: two people may have written the same message.
        options = list(dict.fromkeys([truth, *drawn]))[: len(LETTERS)]
        if len(options) < len(LETTERS):
            raise UserError(
                f"reply_choice needs {len(LETTERS)} different replies in a split, got {len(options)}: add items"
            )
        dice.shuffle(options)
        lines = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, options, strict=True))
        prompt = f"{transcript(replies[key].context)}{QUESTION}{lines}{ANSWER}"
        return Item(key, key, "en", prompt, f" {LETTERS[options.index(truth)]}")

    def protected(self, item: Item) -> list[str]:
        context, options = self.choices(item)
        return [line.split(": ", 1)[-1] for line in context.splitlines()] + list(options.values())

    def choices(self, item: Item) -> tuple[str, dict[str, str]]:
        context, _, rest = item.prompt.removesuffix(ANSWER).partition(QUESTION)
        return context, {f" {line[0]}": line[3:] for line in rest.splitlines()}
