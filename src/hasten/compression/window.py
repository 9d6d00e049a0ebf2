"""Sliding windows: layers that attend to the last tokens only.

A layer that slides reads and keeps no more than `window` keys and values however long the text has become, as
Mistral's do (Jiang et al. 2023, arXiv:2310.06825); a text shorter than the window is computed as before. No weight
changes, so what the network loses is what it looked up further back: leave every few layers full (`full_every`), as
Gemma 3 does (arXiv:2503.19786), or train it afterwards. A Llama becomes a Mistral, where all layers slide; of a Gemma
3 the layers that slide are kept, since the others were trained with a rotary base of their own.

    python pipelines/compress.py plan=default name=near parent=variants/baseline compression=window \\
        compression.window=128
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig


@dataclass
class Window(Compressor):
    """window: tokens that a sliding layer attends to, itself included. full_every: each so-manieth layer attends to
    everything; 0 for none.
    """

    window: int = 128
    full_every: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"compression.window must be at least 1, got {self.window}")
        if self.full_every < 0 or self.full_every == 1:
            raise UserError(f"compression.full_every must be 0 (none) or at least 2, got {self.full_every}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Change the config. Raises `UserError` if no layer would see less, or no family has such layers."""
        from hasten.model.config_json import to_huggingface

        before = self.network(parent).config
        after = self.shape(before)
        ids = {f"{role}_id": parent.config.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
        written = to_huggingface(after, **ids)
        gone = to_huggingface(before, **ids).keys() - written.keys()  # what only the family it was has
        config = {name: value for name, value in parent.config.items() if name not in gone}
        return Compressed({**config, **written}, parent.tensors())

    def shape(self, before: ModelConfig) -> ModelConfig:
        """The parent's shape with that window."""
        if self.window >= (before.sliding_window or before.context):
            raise UserError(
                f"compression.window must be below what the parent's layers attend to "
                f"({before.sliding_window or before.context}), got {self.window}"
            )
        if before.family == "gemma3_text":
            if not before.sliding_layers:
                raise UserError("window needs a Gemma 3 that has sliding layers, got one without")
            if self.full_every:
                raise UserError(
                    f"compression.full_every must be 0 for a Gemma 3, whose full layers stay, got {self.full_every}"
                )
            return replace(before, sliding_window=self.window)
        full = [self.full_every > 0 and (layer + 1) % self.full_every == 0 for layer in range(before.layers)]
        types = ["full_attention" if one else "sliding_attention" for one in full]
        try:
            return replace(before, sliding_window=self.window, layer_types=types if any(full) else [])
        except UserError as error:
            raise UserError(f"window would make a shape that no family has: {error}") from None
