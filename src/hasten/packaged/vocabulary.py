"""A SentencePiece vocabulary as `tokenizer.json`.

SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) in its BPE flavour stores pieces with scores: two neighbours
are joined if their text is a piece, the highest score first, the leftmost first among equals. Hugging Face stores the
same as merges, best first: each way to cut a piece into two others, in the order of the pieces' scores. Spaces are `▁`;
what no piece covers is spelled in bytes.

Pieces somebody defined (runs of line ends, of spaces, of tabs, HTML tags) are cut out of the text before anything is
joined, whatever lies around them; control pieces never match text.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hasten.artifacts import write_json

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"


class TokenType(IntEnum):
    """SentencePiece's kinds of piece, by their numbers in GGUF."""

    normal = 1
    unknown = 2
    control = 3
    user_defined = 4
    unused = 5
    byte = 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: TokenType


def merges(pieces: list[Piece]) -> Iterator[tuple[str, str]]:
    """Every way to join two pieces into a third, best first; of those that give the same one, longest left first."""
    normal = {piece.text for piece in pieces if piece.kind is TokenType.normal}
    for piece in sorted((p for p in pieces if p.kind is TokenType.normal), key=lambda p: -p.score):
        for cut in range(len(piece.text) - 1, 0, -1):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in normal and right in normal:
                yield left, right


def write_tokenizer(folder: Path, pieces: list[Piece], specials: dict[str, int]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. specials: ids of `bos`, `eos`, `pad` and `unk`."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    texts = [piece.text.replace(" ", SPACE) for piece in pieces]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {text: id_ for id_, text in enumerate(texts)},
            list(merges(pieces)),
            unk_token=texts[specials["unk"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = (TokenType.control, TokenType.unknown)
    backend.add_special_tokens(
        [_added(text, False) for text, piece in zip(texts, pieces, strict=True) if piece.kind in special]
    )
    # Spaces have become `▁` by the time that runs of them are looked for; everything else is found in the text itself.
    backend.add_tokens(
        [_added(text, SPACE in text) for text, p in zip(texts, pieces, strict=True) if p.kind is TokenType.user_defined]
    )
    bos = texts[specials["bos"]]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, specials["bos"])]
    )
    backend.save(str(folder / "tokenizer.json"))
    names = {f"{role}_token": texts[id_] for role, id_ in specials.items()}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names},
    )


def _added(text: str, normalized: bool) -> tokenizers.AddedToken:
    import tokenizers

    return tokenizers.AddedToken(text, normalized=normalized)
