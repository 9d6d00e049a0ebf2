"""What a compression method is: parent checkpoint in, variant out, deterministic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Checkpoint

if TYPE_CHECKING:
    import torch

    from hasten.model.grid import Grid


@dataclass
class Calibration:
    """Text a method may look at: token ids, (sequences, length), drawn from the training split only."""

    ids: torch.Tensor
    source: str = ""


@dataclass
class Compressed:
    """What a method hands back: the model's config and tensors, and what it did.

    grid: the grid of its integers, or None if the weights stay float. notes: facts for the manifest
    (deterministic: scores, dropped layers), no timings.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    grid: Grid | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Compressor(ABC):
    """Options live in the subclass; `needs` says what the method has to be given."""

    needs: ClassVar[str] = "nothing"
    """`nothing`, `calibration` or `training`."""
    grids: ClassVar[str] = "keeps its parent's"
    """Which grids the method lands on, in words, for the docs."""

    @property
    def name(self) -> str:
        """The method's one name: its file, its YAML, its tag."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Make the variant. Raises `UserError` if the method makes no sense on this parent."""
