"""Vocabulary pruning: drop the tokens that the plan's text and tasks never use.

A multilingual model knows tokens of a hundred languages, and a plan speaks two. Every token is a row of the embedding
and of the head, and decoding reads the whole head for each token it writes: of Gemma 3 270M two thirds of all weights
are those rows, and a head with a tenth of them is read in a tenth of the time (Ushio et al. 2023, arXiv:2305.15020).
No other weight changes, so text that needs no dropped token gets the same logits as before; any other text is spelled
in smaller tokens that are left, down to bytes, which always stay.

The variant has a tokenizer of its own, whose ids are not the plan's: evaluation encodes with it. Speed is measured for
a number of tokens; where text takes more of them, `text_growth` in the manifest says by what factor (each dropped token
taken by itself).

    python pipelines/compress.py plan=default name=small parent=variants/baseline compression=vocabulary \\
        compression.keep=4096
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.compression.shared.bpe import Bpe, renumbered_config
from hasten.errors import UserError

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""The tensors that have a row for each token."""


@dataclass
class Vocabulary(Compressor):
    """keep: how many tokens stay, the most frequent; 0 means those that come up least_count times, with the pieces they
    are made of. multiple_of: to which multiple that number is rounded up.
    """

    keep: int = 0
    least_count: int = 1
    multiple_of: int = 64

    needs: ClassVar[str] = "counts"

    def __post_init__(self) -> None:
        for name, least in (("keep", 0), ("least_count", 1), ("multiple_of", 1)):
            if getattr(self, name) < least:
                raise UserError(f"compression.{name} must be at least {least}, got {getattr(self, name)}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Drop rows. Raises `UserError` on a quantised parent, a tokenizer that is no BPE, or if no token would go."""
        counts = self.given(calibration).counts
        assert counts is not None
        self.refuse_quantised(parent)
        tokenizer, config = Bpe.read(parent.path), parent.config
        if (last := max(tokenizer.texts)) >= len(counts):
            raise UserError(f"{parent.path} must have a row for each token, got token {last} and {len(counts)} rows")
        kept = self.chosen(tokenizer, tokenizer.named(config), counts.tolist())
        tensors = {name: value[kept] if name in ROWS else value for name, value in parent.tensors().items()}
        new = {old: place for place, old in enumerate(kept)}
        config = {**renumbered_config(config, new), "vocab_size": len(kept)}
        lost = [id_ for id_, count in enumerate(counts.tolist()) if count and id_ not in new]
        total = int(counts.sum())
        longer = sum(
            int(counts[id_]) * (length - 1) for id_, length in zip(lost, tokenizer.lengths(lost, kept), strict=True)
        )
        notes = {
            "kept": len(kept),
            "of": len(counts),
            "used": int((counts > 0).sum()),
            "text_growth": round(1 + longer / total, 6),
        }
        return Compressed(config, tensors, None, notes, tokenizer.reduced(kept))

    def chosen(self, tokenizer: Bpe, named: set[int], counts: Sequence[int]) -> list[int]:
        """The ids that stay, in their order: what is named, then by count, each with the pieces that lead to it."""
        kept = set(named)
        if self.keep:
            wanted = self.keep
            if wanted < len(kept):
                raise UserError(
                    f"compression.keep must be at least {len(kept)} (bytes and control tokens), got {self.keep}"
                )
        else:
            for id_ in tokenizer.texts:
                if counts[id_] >= self.least_count:
                    kept |= tokenizer.way(id_)
            wanted = len(kept)
        wanted = -(-wanted // self.multiple_of) * self.multiple_of
        if wanted >= len(counts):
            if self.keep:
                raise UserError(f"compression.keep must be below the parent's {len(counts)} tokens, got {self.keep}")
            raise UserError(
                f"compression.least_count must leave fewer than the parent's {len(counts)} tokens, got "
                f"{self.least_count}, which keeps {wanted}"
            )
        for id_ in sorted(tokenizer.texts, key=lambda id_: (-counts[id_], id_)):
            if len(kept) == wanted:
                break
            missing = set() if id_ in kept else tokenizer.way(id_) - kept
            if len(kept) + len(missing) <= wanted:
                kept |= missing
        return sorted(kept)
