"""How stage `pretrain` comes by a base model: the `model` axis.

A shape (`ModelConfig`, `LstmConfig`) is trained from scratch; a source (`Huggingface`) is imported.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelRecipe:
    """One entry of `conf/model/`."""
