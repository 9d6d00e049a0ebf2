"""Wanda: zero the weights that matter least to what a matrix says, |weight| times the length of its input.

A score is |W_ij| ||X_j||, the norm being over all tokens of the calibration text, and weights are compared within a
row, so that each output loses the same share (Sun et al. 2023, arXiv:2306.11695). Nothing is solved and no weight that
stays is changed; matrices later in the network see what earlier ones became. A study of accuracy alone: see
`hasten.compression.shared.sparsity`.

    python pipelines/compress.py plan=default name=sparse parent=variants/baseline compression=wanda
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.compression.shared.sparsity import Observant

if TYPE_CHECKING:
    from hasten.compression.shared.layerwise import Treatment


@dataclass
class Wanda(Observant):
    """No options of its own."""

    def treatment(self) -> Treatment:
        from hasten.compression.shared.scored import Scored

        return Scored(self)
