"""AWQ: make the columns that matter larger before rounding, and hide the scaling in the layer before.

A few per cent of a layer's inputs are much larger than the others, and the weights they meet decide the output. AWQ
(Lin et al. 2023, arXiv:2306.00978) multiplies each column by a power of its input's mean magnitude, s = mean|x|^a, and
divides the inputs by it (`shared/folding.py`): among the weights that share a step, the salient ones then lose less.
The power is searched for, 0 to 1 in 20 steps, so that the layer's outputs are closest to what they were; a = 0 is
rounding to nearest as it was, so no layer gets worse on the text that was looked at. Then every group's scale is
searched for by the same measure (the paper's clipping; not for queries and keys, whose product is easily spoilt, nor
for the head).

Where the paper's code runs whole blocks to see how far they are off, this takes ||X (W - Q)||^2 of the matrices that
share the inputs: H = X^T X tells that without running anything. Scaled norms, and biases of scaled rows, are stored as
float32.

Try it: python pipelines/sweep.py -m compression=rtn,awq compression.bits=4 calibration.sequences=128 engine=eager
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed
from hasten.compression.shared.quantiser import Quantiser, Scale, over
from hasten.errors import UserError

UNCLIPPED = ("q_proj", "k_proj", "lm_head")


@dataclass
class Awq(Quantiser):
    """powers: how many steps the search for the power takes. scale: of the groups after that; search is the paper's."""

    powers: int = 20
    scale: Scale = Scale.search

    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.powers < 1:
            raise UserError(f"compression.powers must be at least 1, got {self.powers}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise every linear layer. Raises `UserError` on a quantised parent, another network, or without text."""
        from hasten.compression.shared.layerwise import walk
        from hasten.compression.shared.scaling import Clipping, Protecting, changed

        text, model = self.given(calibration), self.network(parent)
        config, tensors = self.untied(parent)
        scaled = Protecting(self.grid, self.powers)
        walk(model, text, scaled)
        norms = {name: value for name, value in changed(model, tensors).items() if not self.quantises(name)}
        work = Clipping(self.grid, self.scale, plain=UNCLIPPED)
        walk(model, text, work, head=self.head, last=True)
        del model  # what stays float, and was not scaled, comes from the parent's file
        made = over(tensors, norms)
        return self.stored(config, made, work.integers, errors=work.errors, powers=scaled.powers)
