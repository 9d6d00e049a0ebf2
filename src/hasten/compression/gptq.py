"""GPTQ: round the columns of a matrix one after another, and let those still to come make up for the error.

What counts is a layer's output, so the error to keep small is ||X (W - Q)||^2 over calibration text X. Rounding one
weight moves the best values of the others, by a closed form of H = X^T X (optimal brain surgeon, Hassibi and Stork
1993); GPTQ takes all rows in the same order of columns, which makes that one Cholesky factor per matrix (Frantar et al.
2022, arXiv:2210.17323; the algebra is in `shared/compensation.py`).

Two choices make the result an ordinary grid. Scales are fixed before anything is rounded ("static groups"), so that
`act_order`, which starts with the columns whose inputs are largest, is an order of computing alone: groups stay
neighbours, and engines pack what comes out like any other integers. And layers are taken in sequence, each matrix on
the inputs that the rounded ones before it make.

H is made safe to factorise by adding `damping` times its mean diagonal; where that is not enough it is raised tenfold
until it is, which the manifest notes. An input that the text never uses has nothing to tell: its weights go to nearest.

Try it: python pipelines/sweep.py -m compression=rtn,gptq compression.bits=4 calibration.sequences=128 engine=eager
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed
from hasten.compression.shared.quantiser import Quantiser, Scale
from hasten.errors import UserError


@dataclass
class Gptq(Quantiser):
    """act_order: columns with the largest inputs first. damping: added to the diagonal, as a share of its mean.

    scale: nearest, search or signed; the searches weigh each column's error by its inputs.
    """

    act_order: bool = True
    damping: float = 0.01
    scale: Scale = Scale.nearest

    needs: ClassVar[str] = "calibration"
    takes_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise UserError(f"compression.damping must be 0 to 1, got {self.damping}")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise every linear layer. Raises `UserError` on a quantised parent, another network, or without text."""
        from hasten.compression.shared.compensation import Compensating
        from hasten.compression.shared.layerwise import walk

        text, model = self.given(calibration), self.network(parent)
        config, tensors = self.untied(parent)
        work = Compensating(self.grid, self.scale, damping=self.damping, act_order=self.act_order)
        walk(model, text, work, head=self.head, last=True)
        del model  # what stays float comes from the parent's file
        return self.stored(config, tensors, work.integers, errors=work.errors, damping_raised=work.raised)
