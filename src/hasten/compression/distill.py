"""Distil: a pruned network learns from the network it was cut out of.

Pruning leaves a network whose layers expect what is gone. Its ancestor knows better, for every position and for every
token of the vocabulary, so the pruned one learns to predict what that one predicts: Hinton et al. 2015
(arXiv:1503.02531); after pruning, Muralidharan et al. 2024 (Minitron, arXiv:2407.14679). Nothing of its shape
changes, so it is as fast as its parent; what it costs is the steps, each a forward pass of the teacher and three
passes' worth of the student. What can be recovered is what the rows show: see `calibration.tasks`.

Try it: python pipelines/compress.py plan=default name=healed parent=variants/shallow compression=distill \\
    calibration.sequences=1024 calibration.length=256 calibration.tasks=0.9 compression.batch_size=8
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, like_parent
from hasten.compression.shared.recovery import Recovery
from hasten.errors import UserError


@dataclass
class Distill(Recovery):
    """The float baseline teaches unless another ancestor is named."""

    teacher: str = "baseline"

    takes_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise UserError("compression.teacher must name one of the parent's lineage, got ''")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Train every weight. Raises `UserError` on a quantised parent and for a teacher that cannot teach it."""
        text, student = self.given(calibration), self.network(parent)
        learning = self.train(student, parent, text, seed)
        tensors = like_parent(student, parent)
        return Compressed(parent.config, tensors, cost=learning.cost, curves=learning.curves)
