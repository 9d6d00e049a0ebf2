"""A tokenizer somebody else made: a Hugging Face folder or a `tokenizer.json`, kept as it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from hasten.artifacts import Json, digest, read_json
from hasten.errors import UserError
from hasten.tokenizer.base import ROLES, TokenizerRecipe, TrainingText, read_backend, special_tokens, write_tokenizer

# Entries that would make a reader fetch or run something that is not in the folder.
_DROPPED = ("auto_map", "name_or_path", "added_tokens_decoder")


@dataclass
class Imported(TokenizerRecipe):
    """path: the folder or file. bos, eos, pad: the special tokens by name, if the folder does not name them."""

    path: str = ""
    bos: str = ""
    eos: str = ""
    pad: str = ""

    def build(self, text: TrainingText, folder: Path) -> None:
        if not self.path:
            raise UserError("tokenizer.path must name a Hugging Face folder or a tokenizer.json, got nothing")
        path = Path(self.path)
        file, home = (path / "tokenizer.json", path) if path.is_dir() else (path, path.parent)
        backend = read_backend(file)
        tokens = self._tokens(home)
        for role, token in tokens.items():
            if token and backend.token_to_id(token) is None:
                raise UserError(f"tokenizer.{role} must be in the vocabulary of {file}, got {token!r}")
        if not tokens["eos"]:
            raise UserError(f"tokenizer.eos must be given, because {home} names no end-of-text token")
        facts = {"method": "imported", "options": asdict(self), "source": digest(file)}
        write_tokenizer(folder, backend, tokens, self._config(home), facts)

    def _tokens(self, home: Path) -> dict[str, str | None]:
        found = special_tokens(home)
        return {role: getattr(self, role) or found[role] for role in ROLES}

    def _config(self, home: Path) -> Json:
        source = home / "tokenizer_config.json"
        config = read_json(source) if source.is_file() else {}
        return {key: value for key, value in config.items() if key not in _DROPPED}
