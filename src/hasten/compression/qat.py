"""Quantisation-aware training: learn weights that are still right after rounding.

Every step computes with the weights on their grid, w' = round(w / s) s, and moves the weights behind it: rounding has
no slope, so the gradient passes it as if it were not there (the straight-through estimator: Bengio et al. 2013,
arXiv:1308.3432; Jacob et al. 2017, arXiv:1712.05877). Scales follow the weights, the same as `rtn` takes. The float
parent teaches, so that no labels are needed (Liu et al. 2023, LLM-QAT, arXiv:2305.17888). What is stored is the grid
that the last step ended on, so an engine computes what training saw; it pays where rounding hurts, at 4 bits.

Try it: python pipelines/compress.py plan=default name=int4-qat parent=variants/baseline compression=qat \\
    calibration.sequences=1024
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, like_parent
from hasten.compression.shared.quantiser import Quantiser, nearest_scale
from hasten.compression.shared.recovery import PARENT, Recovery


@dataclass
class Qat(Recovery, Quantiser):
    """The float parent teaches; `teacher: ""` is cross-entropy."""

    teacher: str = PARENT
    learning_rate: float = 5e-4

    takes_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Quantiser.__post_init__(self)
        Recovery.__post_init__(self)

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Train on the grid. Raises `UserError` on a quantised parent or a width that does not fit."""
        from torch import nn

        from hasten.compression.shared.straight_through import on_grid
        from hasten.model.grid import quantise

        text, student = self.given(calibration), self.network(parent)
        config, _ = self.untied(parent)
        if self.head:
            student.untie()
        linears = [(name, module) for name, module in student.named_modules() if isinstance(module, nn.Linear)]
        with on_grid([module for name, module in linears if self.quantises(f"{name}.weight")], self.grid):
            learning = self.train(student, parent, text, seed)
        integers = {}
        for name, weight in student.state_dict().items():
            if self.quantises(name):
                scale = nearest_scale(weight, self.grid)
                integers[name] = quantise(weight, scale, self.grid), scale
        tensors = like_parent(student, parent)
        return replace(self.stored(config, tensors, integers), cost=learning.cost, curves=learning.curves)
