"""SparseGPT: zero weights, and let those that stay make up for them.

With H = X^T X over the calibration text, a matrix's squared output error is a quadratic form of its weights' changes.
Setting weight j of a row to zero is made up for best by moving the row's later weights R by -w_j [H_F^-1]_jR /
[H_F^-1]_jj, F being j and R, at a cost of w_j^2 / [H_F^-1]_jj (the optimal brain surgeon: Hassibi and Stork 1992).
Always going from the first column to the last, all those inverses are in one Cholesky factor of H^-1, shared by all
rows; the weights that go are chosen by that cost a block of columns at a time, or four where the pattern is 2:4
(Frantar and Alistarh 2023, arXiv:2301.00774). A study of accuracy alone: see `hasten.compression.shared.sparsity`.

    python pipelines/compress.py plan=default name=sparse parent=variants/baseline compression=sparsegpt
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.compression.shared.sparsity import Observant
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.compression.shared.layerwise import Treatment


@dataclass
class Sparsegpt(Observant):
    """block: columns among which is chosen at once. damping: what H's diagonal is raised by, as a share of its mean."""

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 4 or self.block % 4:
            raise UserError(f"compression.block must be a multiple of 4, got {self.block}")
        if not 0 < self.damping <= 1:
            raise UserError(f"compression.damping must be above 0 and at most 1, got {self.damping}")

    def treatment(self) -> Treatment:
        from hasten.compression.shared.surgeon import Surgeon

        return Surgeon(self)
