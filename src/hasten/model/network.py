"""What every network here has in common, so that training, scoring and engines need not know which one they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.errors import UserError


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
    separates_documents: ClassVar[bool] = True
    """Whether `hidden` can keep the documents of a row apart."""
    can_recompute: ClassVar[bool] = True
    """Whether `recompute` can be set."""

    def __init__(self, config: Any, stack: nn.Module) -> None:
        """stack: everything below the head, with the token embeddings as `embed_tokens`."""
        super().__init__()
        self.config, self.model = config, stack
        self._recompute = False
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding, if the shape says so."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.get_parameter("embed_tokens.weight")

    def untie(self) -> None:
        """Give the head a matrix of its own, equal to the embedding it was."""
        self.config = replace(self.config, tied_head=False)
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())

    @property
    def recompute(self) -> bool:
        """Whether training keeps the input of each block alone and computes the block again for its gradients: a third
        more FLOPs for a fraction of the memory (Chen et al. 2016, arXiv:1604.06174).

        Setting it raises `UserError` where a network cannot.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        if wanted and not self.can_recompute:
            raise UserError(
                "training.activation_checkpointing must be false for a network that cannot compute its blocks again "
                "(an LSTM), got true"
            )
        self._recompute = wanted

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """What the network repeats, in order: what is sharded, compiled and adapted one by one."""

    @abstractmethod
    def set_dropout(self, share: float) -> None:
        """What share of the values that pass from block to block training leaves out at random (Srivastava et al. 2014,
        https://jmlr.org/papers/v15/srivastava14a.html); after `eval()` nothing is. Such modules have no weights, so a
        checkpoint does not know of them.
        """

    @abstractmethod
    def initialise(self, seed: int) -> None:
        """Random weights for training from scratch, the same for the same seed."""

    @abstractmethod
    def hidden(self, ids: Tensor, prompt_tokens: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """What `lm_head` turns into logits, (B, T, hidden): position t predicts token t + 1.

        prompt_tokens, (B,): how many tokens at the start of each row are read before anything is predicted, at least 1
        (None: 1). A decoder predicts from everything before anyway; an encoder-decoder reads them with its encoder,
        and its values at positions before prompt_tokens - 1 are meaningless.

        documents, (B, T): which document of its row a token belongs to, -1 for padding (None: a row is one document).
        No token attends to another document, so each is computed as if it were alone. Raises `UserError` where
        `separates_documents` is false.
        """

    @abstractmethod
    def new_state(self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> State:
        """An empty state for up to `context` tokens."""

    @abstractmethod
    def forward(self, ids: Tensor, cache: State | None = None) -> Tensor:
        """Logits of every position; with a state, which is extended by `ids`, of the last one alone, (B, 1, V)."""
