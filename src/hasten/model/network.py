"""What every network here has in common, so that training, scoring and engines need not know which one they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class State(ABC):
    """What a network remembers of the tokens it has read: a KV cache, or a recurrent state. Overwritten in place."""

    length: int
    """Tokens read so far."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What is allocated."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every token."""


class Network(nn.Module, ABC):
    """ids (B, T) -> logits (B, T, vocabulary), float32."""

    config: Any
    """Its shape: a `ModelConfig` or an `LstmConfig`; both have `vocab_size`, `hidden_size`, `context`, `tied_head`,
    `widest`."""
    lm_head: nn.Linear
    predicts_prompt: ClassVar[bool] = True
    """Whether `hidden` also means something within a prompt of several tokens; an encoder-decoder only reads it."""

    def __init__(self, config: Any, stack: nn.Module) -> None:
        """stack: everything below the head, with the token embeddings as `embed_tokens`."""
        super().__init__()
        self.config, self.model = config, stack
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding, if the shape says so."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.get_parameter("embed_tokens.weight")

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Random weights for training from scratch, the same for the same seed."""

    @abstractmethod
    def hidden(self, ids: Tensor, prompt_tokens: Tensor | None = None) -> Tensor:
        """What `lm_head` turns into logits, (B, T, hidden): position t predicts token t + 1.

        prompt_tokens, (B,): how many tokens at the start of each row are read before anything is predicted, at least 1
        (None: 1). A decoder predicts from everything before anyway; an encoder-decoder reads them with its encoder,
        and its values at positions before prompt_tokens - 1 are meaningless.
        """

    @abstractmethod
    def new_state(self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> State:
        """An empty state for up to `context` tokens."""

    @abstractmethod
    def forward(self, ids: Tensor, cache: State | None = None) -> Tensor:
        """Logits of every position; with a state, which is extended by `ids`, of the last one alone, (B, 1, V)."""
