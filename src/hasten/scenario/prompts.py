"""Where a scenario's prompts come from: slices of held-out text, drawn by seed.

Real text, because what a model is fed decides what some engines do (draft tokens that are accepted,
experts that are chosen); different slices, so that no cache of an earlier prompt shortens a prefill;
the same slices for every trial, so that all are asked the same. The text is the validation split of
the plan's tokens, which no variant was trained on.

A variant with a tokenizer of its own is given the same text as that one's ids: as many tokens to a prompt, so where it
needs more of them for a text its prompts end sooner.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import Tokens
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.tokenizer.translating import Translation


class PromptSource:
    """Prompts from a token folder, in other ids if there is a translation. Raises `UserError` if its validation split
    is empty.
    """

    def __init__(self, tokens: Path, translation: Translation | None = None) -> None:
        import numpy as np

        self._ids = Tokens(tokens).ids("validation")
        if translation is not None:
            self._ids = np.array(translation(self._ids.tolist()), np.int64)
        if len(self._ids) == 0:
            raise UserError(
                f"{tokens}: the validation split must hold at least one token to draw prompts from, got none"
            )

    def draw(self, count: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """`count` prompts of exactly `length` token ids; text shorter than a prompt is repeated."""
        import numpy as np

        total = len(self._ids)
        starts = np.random.default_rng(seed).integers(0, max(1, total - length + 1), size=count)
        return [tuple(self._ids[(start + np.arange(length)) % total].tolist()) for start in starts]
