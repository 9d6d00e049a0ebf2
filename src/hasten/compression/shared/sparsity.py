"""What methods that set single weights to zero share: how many, in which pattern, and which matrices.

They are studies of accuracy: what a network can do without. The zeros are stored like any other weight, and no engine
here reads fewer bytes or multiplies less for them, so such a variant is as large and as fast as its parent. What makes
a network faster are fewer heads, channels, layers and tokens (`width`, `depth`, `vocabulary`). Embeddings and the head
stay whole, as in the papers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.compression.shared.layerwise import Treatment

PATTERNS = ("none", "2:4")


@dataclass
class Sparsifier(Compressor):
    """sparsity: the share of each matrix's weights that become zero. pattern: `2:4` means two of every four neighbours
    in a row, which NVIDIA's sparse tensor cores can skip (Mishra et al. 2021, arXiv:2104.08378); `none` means any.
    """

    sparsity: float = 0.5
    pattern: str = "none"

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UserError(f"compression.sparsity must lie between 0 and 1, got {self.sparsity}")
        if self.pattern not in PATTERNS:
            raise one_of("compression.pattern", self.pattern, list(PATTERNS))
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise UserError(f"compression.sparsity must be 0.5 where pattern is 2:4, got {self.sparsity}")

    def smallest(self, scores: Tensor) -> Tensor:
        """Which of each row's weights go, those with the least score: (rows, columns) -> bool."""
        import torch

        four = self.pattern == "2:4"
        parts = scores.view(-1, 4) if four else scores
        count = 2 if four else int(parts.shape[1] * self.sparsity)
        places = parts.argsort(dim=1, stable=True)[:, :count]  # the first of equals
        return torch.zeros_like(parts, dtype=torch.bool).scatter_(1, places, True).view(scores.shape)

    def refuse_widths(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises `UserError` if a matrix has no groups of four."""
        for name, value in tensors.items():
            if self.pattern == "2:4" and is_inner(name) and value.shape[1] % 4:
                raise UserError(f"compression.pattern 2:4 needs widths that 4 divides, got {value.shape[1]} of {name}")


@dataclass
class Observant(Sparsifier):
    """Looks at what each matrix is given, layer by layer."""

    needs: ClassVar[str] = "calibration"
    takes_factors: ClassVar[bool] = True

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Set weights to zero. Raises `UserError` on a quantised parent or another network than a decoder."""
        from hasten.compression.shared.layerwise import Keeping, walk

        text, model = self.given(calibration), self.network(parent)
        self.refuse_widths(model.state_dict())
        stored, work = parent.stored(), Keeping(self.treatment())
        walk(model, text, work, last=True)
        del model  # what was not looked at comes from the parent's file
        tensors = {
            name: work.weights.pop(name).to(place.dtype) if name in work.weights else stored[name]
            for name, place in stored.places.items()
        }
        return Compressed(dict(parent.config), tensors, None, zeros(tensors))

    @abstractmethod
    def treatment(self) -> Treatment:
        """What is done to each group of matrices."""


def is_inner(name: str) -> bool:
    """Whether a checkpoint's tensor is a matrix between embedding and head."""
    return name.endswith("_proj.weight")


def zeros(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """How many of the weights that methods look at are zero now."""
    inner = [value for name, value in tensors.items() if is_inner(name)]
    return {"zeros": round(sum(int((one == 0).sum()) for one in inner) / sum(one.numel() for one in inner), 6)}
