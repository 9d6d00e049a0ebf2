"""SmoothQuant: move what is hard to round from the activations to the weights.

An engine that multiplies integers rounds activations too, as it goes (`native`: 8 bits, a scale for every 32). A few
channels of them are a hundred times larger than the others and take the whole range. Weights have no such channels, so
SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) divides each channel of a norm's output by

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

and multiplies the columns it meets by it (`shared/folding.py`): in float nothing changes, and both sides round a little
instead of one side badly. alpha 0.5 splits the trouble evenly, more goes to the weights as it rises. The matrices are
then rounded to nearest, as by `rtn`. Outputs of other matrices than norms are left as they are, as in the paper.

It pays where activations become integers; where they stay float, it can only cost.

Try it: python pipelines/sweep.py -m compression=rtn,smoothquant compression.bits=8 engine=native
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed
from hasten.compression.shared.quantiser import Quantiser, nearest_scale
from hasten.errors import UserError


@dataclass
class Smoothquant(Quantiser):
    """8 bits unless told otherwise. alpha: how much of the trouble goes to the weights."""

    bits: int = 8
    alpha: float = 0.5

    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"compression.alpha must be 0 to 1, got {self.alpha}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise every linear layer. Raises `UserError` on a quantised parent, another network, or without text."""
        from hasten.compression.shared.layerwise import walk
        from hasten.compression.shared.scaling import Smoothing, changed

        text, model = self.given(calibration), self.network(parent)
        config, tensors = self.untied(parent)
        walk(model, text, Smoothing(self.alpha))
        scaled = changed(model, tensors)
        del model  # `scaled` alone has its matrices now, and gives them up one by one
        return self.nearest(config, tensors, lambda weight: nearest_scale(weight, self.grid), scaled)
