"""A tokenizer somebody else made: a Hugging Face folder, a `tokenizer.json`, a Hub id or a package, kept as it is.

Its chat template and its licence files come along.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import Json, digest, read_json
from hasten.errors import UserError, one_sentence
from hasten.sources import Wanted, copy_licences, origin, resolve, take
from hasten.tokenizer.base import (
    ROLES,
    TokenizerRecipe,
    TrainingText,
    parse_backend,
    read_backend,
    special_tokens,
    write_tokenizer,
)

if TYPE_CHECKING:
    import tokenizers

# Entries that would make a reader fetch or run something that is not in the folder.
_DROPPED = ("auto_map", "name_or_path", "added_tokens_decoder")
COPIED = ("chat_template.jinja", "tokenizer.model")


@dataclass
class Imported(TokenizerRecipe):
    """path: the folder or file, ORG/NAME on the Hub, or package:NAME. revision: of a Hub id.

    accept_licence: the name of the licence, where the source demands that it be accepted. bos, eos, pad: the special
    tokens by name, if the folder does not name them.
    """

    path: str = ""
    revision: str = ""
    accept_licence: str = ""
    bos: str = ""
    eos: str = ""
    pad: str = ""

    def build(self, text: TrainingText, folder: Path) -> None:
        path = resolve(self.path, self.revision, self.accept_licence, field="tokenizer", wanted=Wanted.tokenizer)
        file, home = (path / "tokenizer.json", path) if path.is_dir() else (path, path.parent)
        with one_sentence(path):
            tokens, config = self._tokens(home), self._config(home)
            backend = read_backend(file)
            dropped = unembedded(file, home, {token for token in tokens.values() if token})
            if dropped:
                backend = without(file, dropped)
            for role, token in tokens.items():
                if token and backend.token_to_id(token) is None:
                    raise UserError(f"tokenizer.{role} must be in the vocabulary of {file}, got {token!r}")
            if not tokens["eos"]:
                raise UserError(f"tokenizer.eos must be given, because {home} names no end-of-text token")
            options = {name: value for name, value in asdict(self).items() if name not in ("path", "revision")}
            source = {**origin(self.path, self.revision, path), "sha256": digest(file)}
            facts = {"method": "imported", "options": options, "source": source, "dropped": dropped}
            write_tokenizer(folder, backend, tokens, config, facts)
            for name in COPIED:
                if (home / name).is_file() and not (name == "tokenizer.model" and dropped):  # it would have them still
                    take(home / name, folder / name)
            copy_licences(home, folder)

    def _tokens(self, home: Path) -> dict[str, str | None]:
        found = special_tokens(home)
        return {role: getattr(self, role) or found[role] for role in ROLES}

    def _config(self, home: Path) -> Json:
        source = home / "tokenizer_config.json"
        config = read_json(source) if source.is_file() else {}
        try:
            json.dumps(config, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:  # NaN, infinity, half a character: Python's reader takes them
            raise UserError(f"{source} holds what JSON cannot: {error}") from None
        return {key: value for key, value in config.items() if key not in _DROPPED}


def unembedded(file: Path, home: Path, needed: set[str]) -> list[str]:
    """Added tokens that the model beside the tokenizer has no embedding for, and nobody needs.

    Gemma 3's text models are given out with the tokenizer of those that see: its last token, <image_soft_token>, has no
    row in their embedding, and stands for what no text holds.
    """
    config = read_json(home / "config.json") if (home / "config.json").is_file() else {}
    rows, content = config.get("vocab_size"), read_json(file)
    if not isinstance(rows, int):
        return []
    learned = content["model"].get("vocab") or {}
    beyond = [token["content"] for token in content.get("added_tokens") or [] if token["id"] >= rows]
    return [token for token in beyond if token not in learned and token not in needed]


def without(file: Path, tokens: list[str]) -> tokenizers.Tokenizer:
    """A `tokenizer.json` less some of its added tokens."""
    content = read_json(file)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in tokens]
    return parse_backend(json.dumps(content))
