"""The shape of a decoder, as a config (`conf/model/*.yaml`) and as arithmetic.

Names follow the field: `layers` blocks of grouped-query attention (`heads` query heads share
`kv_heads` key/value heads) and a SwiGLU feed-forward of width `feed_forward_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import UserError


@dataclass
class ModelConfig:
    """A Llama-family decoder.

    vocab_size: 0 means the tokenizer's. head_size: 0 means hidden_size / heads. context: the longest
    sequence the model is meant for. tied_head: the output matrix is the embedding.
    """

    layers: int = 4
    hidden_size: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 0
    feed_forward_size: int = 704
    vocab_size: int = 0
    context: int = 512
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tied_head: bool = True
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in ("layers", "hidden_size", "heads", "kv_heads", "feed_forward_size"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} must be at least 1, got {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads must divide model.heads ({self.heads}), got {self.kv_heads}")
        if self.hidden_size % self.heads:  # also with a head_size of its own: transformers opens no other Llama
            raise UserError(f"model.heads must divide model.hidden_size ({self.hidden_size}), got {self.heads}")
        if self.head_size < 0 or self.head_width % 2:
            raise UserError(f"model.head_size must be even (RoPE turns pairs), got {self.head_width}")
        if self.context < 2:
            raise UserError(f"model.context must be at least 2, got {self.context}")
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size must be 0 (the tokenizer's) or more, got {self.vocab_size}")

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_size or self.hidden_size // self.heads
