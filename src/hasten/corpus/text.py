"""Small functions on text that corpora, tasks and decontamination share."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# One Chinese or Japanese character is a unit of its own; other scripts are cut into runs of letters and digits.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def units(text: str) -> list[str]:
    """Words (or single Chinese characters) of a text, without case, width, punctuation and spacing."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


def compact(text: str) -> str:
    """`units` run together: texts that differ only in case, width, punctuation or spacing become equal."""
    return "".join(units(text))


def valid(text: str) -> str:
    """The text with lone surrogates, which JSON allows and UTF-8 does not, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def uniform(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`: decides splits and orders."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]) / 2**56


def fingerprint(text: str) -> str:
    """A short name for a text: 16 hex digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shorten(text: str, limit: int) -> str:
    """The beginning of a text, at most `limit` characters, ended at a space if one is near; 0 means all of it."""
    text = " ".join(text.split())
    if not limit or len(text) <= limit:
        return text
    cut = text[: limit - 1]
    space = cut.rfind(" ", limit * 3 // 4)
    return (cut[:space] if space > 0 else cut) + "…"
