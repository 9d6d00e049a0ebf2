"""Held-out text as a token folder, for a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hasten.artifacts import Tokens, write_json
from hasten.tokenizer.base import Tokenizer

LANGUAGES = ["en", "zh"]
ENGLISH = ["The lazy dog jumps.", "A fox: 2026 times over!", "x", "The quick brown fox jumps over the lazy dog. " * 9]
CHINESE = ["今天天气很好，我们去公园散步吧。", "公园", "天气预报说明天有雨。" * 12]


def write_tokens(folder: Path, tokenizer: Tokenizer, documents: Sequence[tuple[str, str | list[int]]]) -> Tokens:
    """A validation split of (language, text or ids): `[bos] text [eos]` each."""
    folder.mkdir(parents=True)
    bodies = [tokenizer.encode(text) if isinstance(text, str) else text for _, text in documents]
    sequences = [[tokenizer.bos_id, *body, tokenizer.eos_id] for body in bodies]
    np.array([id_ for ids in sequences for id_ in ids], np.uint16).tofile(folder / "validation.bin")
    np.save(folder / "validation.offsets.npy", np.cumsum([0, *map(len, sequences)]).astype(np.int64))
    codes = [LANGUAGES.index(language) for language, _ in documents]
    np.save(folder / "validation.languages.npy", np.array(codes, np.uint8))
    write_json(folder / "manifest.json", {"schema": 1, "kind": "tokens", "dtype": "uint16", "languages": LANGUAGES})
    return Tokens(folder)


def bilingual() -> list[tuple[str, str]]:
    """Short and long documents of both languages, one after another as a corpus would mix them."""
    return [("en", text) for text in ENGLISH] + [("zh", text) for text in CHINESE]
