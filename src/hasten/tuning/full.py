"""Full fine-tuning: every weight moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.tuning.base import Tuning

if TYPE_CHECKING:
    from hasten.model.network import Network


@dataclass
class Full(Tuning):
    """Nothing to add and nothing to merge."""

    def attach(self, model: Network, *, seed: int, low_precision: bool) -> None:
        model.requires_grad_(True)

    def merge(self, model: Network) -> None:
        """The weights already are the model's own."""
