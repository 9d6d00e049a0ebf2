"""The one exception that reaches a user as a sentence instead of a traceback.

Raise `UserError` for everything the user can mend (a bad option, a missing file, a corrupt
checkpoint): name the field, the value given and what is accepted. Everything else is a bug and
keeps its traceback. Entry points print the sentence and exit with `EXIT_CODE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2
LONGEST_SENTENCE = 480


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, and what would be accepted."""


class TogetherError(UserError):
    """Raised in all processes of a job at the same place, so that the first one says it for all."""


def one_of(field: str, value: object, accepted: object) -> UserError:
    """`UserError` in the house style: ``bits must be one of [4, 8], got 5``."""
    return UserError(f"{field} must be one of {accepted}, got {value!r}")


@contextmanager
def one_sentence(subject: object) -> Iterator[None]:
    """Name what is read in front of what is wrong with it, on one line, however much of it was quoted."""
    try:
        yield
    except UserError as error:
        sentence = " ".join(str(error).split())
        sentence = sentence if str(subject) in sentence else f"{subject}: {sentence}"
        if len(sentence) > LONGEST_SENTENCE:
            sentence = f"{sentence[:LONGEST_SENTENCE]}..."
        raise UserError(sentence) from None
