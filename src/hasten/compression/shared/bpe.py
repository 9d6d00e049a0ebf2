"""A byte-pair tokenizer with fewer tokens.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) begins with characters and joins the two neighbours whose
merge was learnt first, until none can be joined. Which neighbours are joined on the way to a token depends on that
token's own characters alone: whatever lies around them was never joined to them. So if a token stays, and every
piece on its own way with it, text that was encoded into tokens that stay is encoded into the same ones: each join of
old is there still, and is still the best there is. Text that needed a token that went is spelled in smaller ones, down
to bytes, which stay all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hasten.artifacts import Json, read_json
from hasten.errors import UserError

SPACE = "▁"
"""What SentencePiece writes for a space: its bytes are decoded to themselves, not to a space."""
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
LISTS = ("additional_special_tokens", "extra_special_tokens")
Ranks = Mapping[tuple[str, str], int]


def encode(text: str, ranks: Ranks) -> tuple[list[str], set[str]]:
    """The pieces that a word ends up as, and all that there were on the way."""
    pieces, seen = list(text), set(text)
    while True:
        known = [
            (rank, i) for i, pair in enumerate(itertools.pairwise(pieces)) if (rank := ranks.get(pair)) is not None
        ]
        if not known:
            return pieces, seen
        _, first = min(known)
        pieces[first : first + 2] = [pieces[first] + pieces[first + 1]]
        seen.add(pieces[first])


@dataclass(frozen=True)
class Bpe:
    """The tokenizer of a checkpoint. content: its `tokenizer.json`."""

    folder: Path
    content: Json

    @classmethod
    def read(cls, folder: Path) -> Bpe:
        """Raises `UserError` unless it is byte-pair encoding that can spell every text."""
        path = folder / "tokenizer.json"
        found = cls(folder, read_json(path))
        model = found.content.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise UserError(f"{path} must hold a BPE tokenizer, got {model.get('type') if model else None!r}")
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(option):
                raise UserError(f"{path}: {option} must be empty, got {model[option]!r}")
        if missing := [text for text in found.spelling if text not in model["vocab"]]:
            raise UserError(
                f"{path} must have a token for each byte, so that every text is encoded, got no {missing[0]}"
            )
        return found

    @cached_property
    def model(self) -> Json:
        return dict(self.content["model"])

    @cached_property
    def added(self) -> list[Json]:
        return list(self.content.get("added_tokens") or [])

    @cached_property
    def texts(self) -> dict[int, str]:
        """Every token by its id."""
        return {id_: text for text, id_ in self.model["vocab"].items()} | {
            token["id"]: token["content"] for token in self.added
        }

    @cached_property
    def ids(self) -> dict[str, int]:
        return {text: id_ for id_, text in self.texts.items()}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in self.model["merges"])
        return [(left, right) for left, right in pairs]

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """Which neighbours are joined, the first first."""
        return {pair: rank for rank, pair in reversed(list(enumerate(self.merges)))}

    @cached_property
    def byte_level(self) -> bool:
        """Whether text is bytes before it is tokens; otherwise bytes spell the characters that have no token."""
        pre = self.content.get("pre_tokenizer") or {}
        return any(part.get("type") == "ByteLevel" for part in pre.get("pretokenizers", [pre]))

    @cached_property
    def spelling(self) -> list[str]:
        """The 256 tokens of the bytes."""
        from tokenizers.pre_tokenizers import ByteLevel

        return sorted(ByteLevel.alphabet()) if self.byte_level else [f"<0x{byte:02X}>" for byte in range(256)]

    def way(self, id_: int) -> set[int]:
        """A token with every piece that leads to it; by itself if none do (a control token, a run of line ends)."""
        pieces, seen = encode(self.texts[id_], self.ranks)
        return {self.ids[piece] for piece in seen} if len(pieces) == 1 else {id_}

    def named(self, config: Json) -> set[int]:
        """Tokens that stay whether or not a text has them: bytes, and whatever a file of the checkpoint speaks of."""
        files = [read_json(self.folder / name) for name in CONFIGS if (self.folder / name).is_file()]
        names = {self.model.get("unk_token"), *self.spelling, *([] if self.byte_level else [SPACE])}
        for file in files:
            for key, value in file.items():
                if key.endswith("_token") or key in LISTS:
                    names.update(strings(value))
        template = self.folder / "chat_template.jinja"
        written = [str(file.get("chat_template", "")) for file in files]
        written += [template.read_text(encoding="utf-8")] if template.is_file() else []
        names |= {token["content"] for token in self.added if any(token["content"] in text for text in written)}
        found = {self.ids[name] for name in names if name in self.ids}
        processor = self.content.get("post_processor") or {}
        return found | (set(ids_of(config)) | set(processor_ids(processor))) & self.texts.keys()

    def reduced(self, kept: Sequence[int]) -> dict[str, Json | None]:
        """The tokenizer's files with those tokens alone, numbered in their order; None for a file that it loses."""
        new = {old: place for place, old in enumerate(kept)}
        vocabulary = {text: new[id_] for text, id_ in self.model["vocab"].items() if id_ in new}
        merges = [
            written
            for written, (left, right) in zip(self.model["merges"], self.merges, strict=True)
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
        content = {
            **self.content,
            "added_tokens": [{**token, "id": new[token["id"]]} for token in self.added if token["id"] in new],
            "post_processor": renumbered(self.content.get("post_processor"), new),
            "model": {**self.model, "vocab": vocabulary, "merges": merges},
        }
        files: dict[str, Json | None] = {"tokenizer.json": content}
        path = self.folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        if "added_tokens_decoder" in config:
            decoder = {int(id_): token for id_, token in config["added_tokens_decoder"].items()}
            left = {str(new[id_]): token for id_, token in decoder.items() if id_ in new}
            files[path.name] = {**config, "added_tokens_decoder": left}
        return files | ({"tokenizer.model": None} if (self.folder / "tokenizer.model").is_file() else {})

    def lengths(self, ids: Iterable[int], kept: Iterable[int]) -> list[int]:
        """How many of the tokens that are kept spell each of `ids`, taken by itself."""
        texts = {self.texts[id_] for id_ in kept}
        ranks = {pair: rank for pair, rank in self.ranks.items() if {*pair, "".join(pair)} <= texts}
        spelled = (encode(self.texts[id_], ranks)[0] for id_ in ids)
        return [sum(1 if piece in texts else len(piece.encode()) for piece in pieces) for pieces in spelled]


def strings(value: Any) -> Iterator[str]:
    """The token or tokens that a file names: by their text, or by objects that hold it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from [value["content"]] if isinstance(value.get("content"), str) else strings(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def ids_of(config: Json) -> Iterator[int]:
    """The token ids that a `config.json` names."""
    for key, value in config.items():
        if key.endswith("_token_id"):
            yield from [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]


def processor_ids(processor: Json) -> Iterator[int]:
    """The token ids that a `tokenizer.json`'s post-processor puts around a text."""
    for part in processor.get("processors", []):
        yield from processor_ids(part)
    for token in processor.get("special_tokens", {}).values():
        yield from token["ids"]
    yield from [processor[role][1] for role in ("sep", "cls") if role in processor]


def renumbered(processor: Json | None, new: Mapping[int, int]) -> Json | None:
    """The post-processor with its token ids as they are now."""
    if processor is None:
        return None
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [renumbered(part, new) for part in found["processors"]]
    if "special_tokens" in found:
        tokens = found["special_tokens"].items()
        found["special_tokens"] = {name: {**one, "ids": [new[id_] for id_ in one["ids"]]} for name, one in tokens}
    for role in {"sep", "cls"} & found.keys():
        found[role] = [found[role][0], new[found[role][1]]]
    return found


def renumbered_config(config: Json, new: Mapping[int, int]) -> Json:
    """`config.json` with its token ids as they are now."""

    def one(value: Any) -> Any:
        return [one(part) for part in value] if isinstance(value, list) else new.get(value)

    return {key: one(value) if key.endswith("_token_id") else value for key, value in config.items()}
