"""A base model that somebody else trained: the `model` axis' entry that stage `pretrain` imports."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.errors import UserError
from hasten.model.recipe import ModelRecipe


@dataclass
class Huggingface(ModelRecipe):
    """path: a folder with a Hugging Face checkpoint, ORG/NAME on the Hub, or package:NAME. revision: of a Hub id.

    accept_licence: the name of the licence, where the source demands that it be accepted. verify_tokens: how many
    random tokens' logits are compared with those that transformers computes from the same checkpoint, 0 for none.
    """

    path: str = ""
    revision: str = ""
    accept_licence: str = ""
    verify_tokens: int = 32

    def __post_init__(self) -> None:
        if self.verify_tokens < 0:
            raise UserError(f"model.verify_tokens must be 0 (no comparison) or more, got {self.verify_tokens}")
