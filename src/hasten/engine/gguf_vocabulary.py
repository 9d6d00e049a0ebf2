"""The tokenizer's part of a GGUF file, read from a checkpoint's `tokenizer.json`.

hasten sends and receives token ids, so its own runs never use these fields to tokenise; they are
written so that the same file opens in stock llama.cpp and so that llama.cpp knows which id ends a
text. Two kinds of tokenizer are known: byte-level BPE (llama.cpp's `gpt2`) and SentencePiece BPE with
byte fallback (its `llama`). llama.cpp splits text by a named rule (`tokenizer.ggml.pre`); the rule that
matches is looked up from the pre-tokenizer, `default` is written where none is known to match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.artifacts import Json, read_json
from hasten.errors import UserError
from hasten.packaged.vocabulary import TokenType

PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
"""The patterns that Llama 3 and Qwen 2 were published with, and llama.cpp's names for them."""


@dataclass(frozen=True)
class Vocabulary:
    """model: `gpt2` (byte-level BPE), `llama` (SentencePiece) or `rwkv` (plain strings).

    pre: llama.cpp's splitting rule. tokens, types: one per row of the model's embedding. merges: `left
    right`, best first. specials: ids of `bos`, `eos`, `padding` and `unknown`, those that exist. scores: of
    SentencePiece, one per token. space_prefix: whether a text begins as if a space came before it.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    specials: dict[str, int]
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def id_vocabulary(size: int) -> Vocabulary:
    """Token 17 is the text `17 `, whatever it means: for ids in, ids out.

    `rwkv` is the one vocabulary of llama.cpp's without any special token unless the file names one.
    """
    return Vocabulary("rwkv", "default", [f"{id_} " for id_ in range(size)], [TokenType.normal] * size, [], {})


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of the checkpoint in `folder`, padded with unused tokens to `size` entries.

    Raises `UserError` if `tokenizer.json` is missing, is no BPE or holds more tokens than the model has rows.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise UserError(f"{path} must hold a BPE tokenizer with a vocabulary and merges")
    added = {int(token["id"]): token for token in tokenizer.get("added_tokens", [])}
    by_id = {int(id_): str(text) for text, id_ in model["vocab"].items()}
    by_id.update({id_: str(token["content"]) for id_, token in added.items()})
    if by_id and max(by_id) >= size:
        raise UserError(f"{path} holds token id {max(by_id)}, but the model's vocab_size is {size}")
    sentencepiece = bool(model.get("byte_fallback"))
    types = [_type(id_, by_id, added, model.get("unk_token"), sentencepiece) for id_ in range(size)]
    tokens = [by_id.get(id_, f"[unused {id_}]") for id_ in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=splitting_rule(tokenizer.get("pre_tokenizer")),
        # llama.cpp looks for these in the text itself, before spaces become `▁`.
        tokens=[
            token.replace("▁", " ") if sentencepiece and kind is TokenType.user_defined else token
            for token, kind in zip(tokens, types, strict=True)
        ],
        types=types,
        merges=merges,
        specials=_special_ids(folder, {text: id_ for id_, text in by_id.items()}),
        scores=_scores(tokens, merges) if sentencepiece else [],
        space_prefix=sentencepiece and space_prefix(tokenizer),
    )


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Higher for what is joined sooner: less the rank of the first merge that gives a token; the rest comes last."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault(merge.replace(" ", "", 1), len(ranks))
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def space_prefix(tokenizer: Json) -> bool:
    """Whether a `tokenizer.json` puts a `▁` before a text."""
    normalizer = tokenizer.get("normalizer") or {}
    if any(part.get("type") == "Prepend" for part in normalizer.get("normalizers", [normalizer])):
        return True
    parts = _flatten(tokenizer.get("pre_tokenizer"))
    return any(part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts)


def splitting_rule(pre_tokenizer: Json | None) -> str:
    """llama.cpp's name for the way a `tokenizer.json` splits text before merging."""
    parts = _flatten(pre_tokenizer)
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        for regex, rule in PATTERNS.items():
            if parts[0] == {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                return rule
    return "default"


def _flatten(pre_tokenizer: Json | None) -> list[Json]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))


def _type(id_: int, by_id: dict[int, str], added: dict[int, Json], unknown: str | None, bytes_: bool) -> TokenType:
    if id_ not in by_id:
        return TokenType.unused
    if unknown is not None and by_id[id_] == unknown:
        return TokenType.unknown
    if id_ in added:
        return TokenType.control if added[id_].get("special") else TokenType.user_defined
    is_byte = bytes_ and len(by_id[id_]) == 6 and by_id[id_].startswith("<0x")
    return TokenType.byte if is_byte else TokenType.normal


def _special_ids(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """bos, eos, pad and unk: by name from `tokenizer_config.json`, else by id from `config.json`."""
    named = folder / "tokenizer_config.json"
    names = read_json(named) if named.is_file() else {}
    config = read_json(folder / "config.json")
    found = {
        name: _special_id(names.get(f"{kind}_token"), config.get(f"{kind}_token_id"), ids)
        for name, kind in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk"))
    }
    return {name: id_ for name, id_ in found.items() if id_ is not None}


def _special_id(name: Any, id_: Any, ids: dict[str, int]) -> int | None:
    text = name.get("content") if isinstance(name, dict) else name
    if text in ids:
        return ids[text]
    first = id_[0] if isinstance(id_, list) and id_ else id_
    return first if isinstance(first, int) else None
