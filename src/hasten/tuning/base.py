"""Which weights fine-tuning moves, and how they go back into a plain checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.network import Network


@dataclass
class Tuning(ABC):
    """A way of fine-tuning."""

    strategies: ClassVar[tuple[str, ...]] = ("single", "ddp", "fsdp", "tensor_parallel", "hybrid")
    """Values of `training.strategy` that it goes with."""

    @property
    def name(self) -> str:
        """The one name: its file, its YAML."""
        return type(self).__module__.rsplit(".", 1)[-1]

    def refuse_strategy(self, strategy: str) -> None:
        """Raises `UserError` for a strategy that it does not go with."""
        if strategy not in self.strategies:
            raise UserError(
                f"training.strategy must be one of {list(self.strategies)} with tuning={self.name}, got {strategy!r}"
            )

    @abstractmethod
    def attach(self, model: Network, *, seed: int, low_precision: bool) -> None:
        """Choose what trains: set `requires_grad`, add modules.

        seed: decides whatever is drawn. low_precision: matrix products will be computed in bfloat16. Raises `UserError`
        if the model has nothing to attach to.
        """

    @abstractmethod
    def merge(self, model: Network) -> None:
        """Undo `attach` so that the model is a plain network again, with what was learned in its weights."""
