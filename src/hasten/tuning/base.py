"""Which weights fine-tuning moves, and how they go back into a plain checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.model.network import Network


@dataclass
class Tuning(ABC):
    """A way of fine-tuning."""

    @abstractmethod
    def attach(self, model: Network) -> None:
        """Choose what trains: set `requires_grad`, add modules."""

    @abstractmethod
    def merge(self, model: Network) -> None:
        """Undo `attach` so that the model is a plain decoder again, with what was learned in its weights."""
