"""Magnitude pruning: the smallest weights of each matrix become zero.

The oldest idea (Han et al. 2015, arXiv:1506.02626) and the bar for every other: it looks at no data. Of large language
models half the weights cannot go that way, because some inputs are so large that small weights on them matter (Sun et
al. 2023, arXiv:2306.11695: `wanda`); small ones may not show the difference. A study of accuracy alone: see
`hasten.compression.shared.sparsity`.

    python pipelines/compress.py plan=default name=sparse parent=variants/baseline compression=magnitude
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed
from hasten.compression.shared.sparsity import Sparsifier, is_inner, zeros


@dataclass
class Magnitude(Sparsifier):
    """Any network: of an LSTM, the gates' matrices."""

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Set weights to zero. Raises `UserError` on a quantised parent."""
        self.refuse_quantised(parent)
        self.refuse_widths(parent.tensors())
        tensors = {}
        for name, weight in parent.stored().items():
            if is_inner(name):
                rows = weight if self.pattern == "2:4" else weight.view(1, -1)  # compared over the whole matrix
                weight.masked_fill_(self.smallest(rows.abs()).view(weight.shape), 0)
            tensors[name] = weight
        return Compressed(dict(parent.config), tensors, None, zeros(tensors))
