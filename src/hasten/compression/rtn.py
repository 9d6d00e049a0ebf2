"""Round to nearest: the quantiser every other one has to beat.

For each group of `group_size` neighbouring weights the scale spreads the largest magnitude over the
grid, s = max|w| / ((2^b - 1) / 2), and every weight goes to its nearest grid point (Nagel et al.
2021, arXiv:2106.08295). Decoding reads 4 to 8 times fewer weight bytes, which is where the speed
comes from; the error is about half a step per weight at most (the largest may be clipped by
a little more), which 8 bits hide and 4 bits may not. At 4 bits a searched scale (`scale`) gives up on a group's
outliers where that serves the rest.

Try it: python pipelines/sweep.py -m compression=rtn compression.bits=4,8 engine=eager,llamacpp
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed
from hasten.compression.shared.quantiser import Quantiser, Scale, chosen_scale


@dataclass
class Rtn(Quantiser):
    """8 bits unless told otherwise. scale: nearest, search or signed; the searches make the squared error smallest."""

    bits: int = 8
    scale: Scale = Scale.nearest

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise every linear layer. Raises `UserError` on a quantised parent or a width that does not fit."""
        return self.nearest(*self.untied(parent), lambda weight: chosen_scale(weight, self.grid, self.scale))
