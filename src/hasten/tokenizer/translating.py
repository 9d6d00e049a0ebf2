"""Ids of one tokenizer as those of another, through the text that they spell.

A plan's tokens, prompts and items are ids of the plan's tokenizer. A variant may speak another one
(`compression=vocabulary` drops tokens, so that those that are left have other ids); what it is given and what it says
then pass through here. Control tokens have no text: they go by the part they play (bos, eos, pad) or by their name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hasten.artifacts import digest
from hasten.tokenizer.base import ROLES, Tokenizer, load_tokenizer

BROKEN = "\ufffd"
"""What decoding makes of part of a character."""


@dataclass(frozen=True)
class Translation:
    """From `source` to `target`. A control token that the target lacks is left out."""

    source: Tokenizer
    target: Tokenizer

    @property
    def back(self) -> Translation:
        """The other way."""
        return Translation(self.target, self.source)

    @cached_property
    def controls(self) -> dict[int, int | None]:
        """What each of the source's control tokens is in the target."""
        added = self.source.backend.get_added_tokens_decoder()
        found = {id_: self.target.backend.token_to_id(one.content) for id_, one in added.items() if one.special}
        roles = {getattr(self.source, f"{role}_id"): getattr(self.target, f"{role}_id") for role in reversed(ROLES)}
        return {**found, **{id_: other for id_, other in roles.items() if id_ is not None}}

    def __call__(self, ids: Sequence[int], *, cut: bool = False) -> list[int]:
        """The same text in the target's ids.

        cut: the ids may begin or end inside a character; what there is of it is left out.
        """
        found: list[int] = []
        start = 0
        for place, id_ in enumerate(ids):
            if id_ in self.controls:
                other = self.controls[id_]
                found += [*self._text(ids[start:place], cut), *([] if other is None else [other])]
                start = place + 1
        return found + self._text(ids[start:], cut)

    def _text(self, ids: Sequence[int], cut: bool) -> list[int]:
        text = self.source.decode(ids)
        return self.target.encode(text.strip(BROKEN) if cut else text) if text else []


def own_tokenizer(plan: Path, model: Path) -> Tokenizer:
    """What a checkpoint's ids mean: its own tokenizer, or the plan's if it has none."""
    return load_tokenizer(model if (model / "tokenizer.json").is_file() else plan)


def translation(plan: Path, model: Path) -> Translation | None:
    """From the ids of the tokenizer in folder `plan` to those of the checkpoint in folder `model`.

    None where they are the same: the checkpoint has a copy of that tokenizer, or none of its own.
    """
    files = [folder / "tokenizer.json" for folder in (plan, model)]
    if not all(file.is_file() for file in files) or digest(files[0]) == digest(files[1]):
        return None
    return Translation(load_tokenizer(plan), load_tokenizer(model))
