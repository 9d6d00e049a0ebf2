"""What a tokenizer is: a folder with `tokenizer.json` that turns text into ids and back.

`load_tokenizer(folder)` reads any Hugging Face folder with the `tokenizers` library alone.

Templates: a pre-training document is `[bos] text [eos]`, a task prompt `[bos] prompt`, its
completion `completion [eos]`, encoded apart from the prompt; generation stops at `eos`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import SCHEMA, Json, read_json, write_json
from hasten.errors import UserError

if TYPE_CHECKING:
    import tokenizers

ROLES = ("bos", "eos", "pad")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Text that merely looks like a special token is encoded as text."""

    backend: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    pad_id: int | None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, in parallel where the library may."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are skipped."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def decode_many(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """`decode` for each sequence of ids."""
        return list(self.backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=True))

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """`[bos] text`: what an engine is given."""
        return (self.bos_id, *self.encode(text))

    def completion_ids(self, text: str) -> tuple[int, ...]:
        """`text [eos]`: what an engine should answer."""
        return (*self.encode(text), self.eos_id)


@dataclass(frozen=True)
class TrainingText:
    """Text a tokenizer may be trained on: training split only.

    bytes_per_language: UTF-8 bytes there are. documents: starts a new pass over (language, text).
    """

    bytes_per_language: dict[str, int]
    documents: Callable[[], Iterator[tuple[str, str]]]


@dataclass
class TokenizerRecipe(ABC):
    """A way to come by a tokenizer; the options of the `tokenizer` axis."""

    @abstractmethod
    def build(self, text: TrainingText, folder: Path) -> None:
        """Fill an existing, empty `folder` with the tokenizer's files. Raises `UserError` if that cannot be done."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder. Without a beginning token, `eos` also begins (GPT-2's habit).

    Raises `UserError` if there is none, or none that says where a text ends.
    """
    backend = read_backend(folder / "tokenizer.json")
    ids = {role: backend.token_to_id(token) if token else None for role, token in special_tokens(folder).items()}
    if ids["eos"] is None:
        raise UserError(f"{folder} names no end-of-text token that its vocabulary holds (eos_token)")
    bos = ids["bos"] if ids["bos"] is not None else ids["eos"]
    return Tokenizer(backend, bos, ids["eos"], ids["pad"])


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """A `tokenizer.json`. Raises `UserError` if it is missing or corrupt."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; a tokenizer is a Hugging Face folder with tokenizer.json")
    try:
        return parse_backend(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a readable tokenizer.json: {error}") from None


def parse_backend(text: str) -> tokenizers.Tokenizer:
    """The tokenizer that the text of a `tokenizer.json` describes. Raises what the library raises."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(text)
    backend.encode_special_tokens = True  # control tokens cannot be smuggled in through text
    backend.no_padding()
    backend.no_truncation()
    return backend


def special_tokens(folder: Path) -> dict[str, str | None]:
    """The tokens named for `bos`, `eos` and `pad`, from whichever Hugging Face file names them first."""
    found: dict[str, str | None] = dict.fromkeys(ROLES)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        for role in ROLES:
            found[role] = found[role] or _token_name(values.get(f"{role}_token"))
    return found


def _token_name(value: Any) -> str | None:
    """A token is given by its text, or by an object that holds it; of several the first is the one."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("content")
    whole = isinstance(value, str) and not any(0xD800 <= ord(character) < 0xE000 for character in value)
    return str(value) if whole else None  # JSON can hold half a character, no vocabulary does


def write_tokenizer(
    folder: Path, backend: tokenizers.Tokenizer, tokens: dict[str, str | None], config: Json, facts: Json
) -> None:
    """Write a folder that both `load_tokenizer` and `transformers.AutoTokenizer` read.

    config: further entries of `tokenizer_config.json`; facts: further entries of the manifest.
    """
    named = {f"{role}_token": token for role, token in tokens.items() if token}
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named})
    write_json(folder / "special_tokens_map.json", dict(named))
    loaded = load_tokenizer(folder)
    ids = {f"{role}_id": getattr(loaded, f"{role}_id") for role in ROLES}
    manifest = {"schema": SCHEMA, "kind": "tokenizer", "vocab_size": loaded.vocab_size, **ids, **facts}
    write_json(folder / "manifest.json", manifest)
