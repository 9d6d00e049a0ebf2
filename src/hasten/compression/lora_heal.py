"""Heal with adapters: a pruned network learns again in few directions, its own weights as an anchor.

Low-rank adapters (Hu et al. 2021, arXiv:2106.09685; `hasten.tuning.lora`) learn beside the frozen matrices of the
blocks and are added to them in the end, so that nothing of them costs an engine anything. As a repair after pruning:
Ma et al. 2023 (LLM-Pruner, arXiv:2305.11627). Against `distill` it saves memory, 16 bytes per trained parameter, and
forgets less of what the rows do not show; it learns less, too.

Try it: python pipelines/compress.py plan=default name=healed parent=variants/shallow compression=lora_heal \\
    calibration.sequences=1024 compression.teacher=baseline
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, like_parent
from hasten.compression.shared.recovery import Recovery, speaking_of_compression
from hasten.tuning.lora import TARGETS

if TYPE_CHECKING:
    from hasten.tuning.lora import Lora


@dataclass
class LoraHeal(Recovery):
    """rank, alpha, targets: as in `tuning=lora`. Cross-entropy unless a teacher is named."""

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: list(TARGETS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters()

    def adapters(self) -> Lora:
        """Raises `UserError` for options that no adapter has."""
        from hasten.tuning.lora import Lora

        with speaking_of_compression():
            return Lora(self.rank, self.alpha, list(self.targets))

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Train adapters and merge them. Raises `UserError` on a quantised parent and for a target it lacks."""
        text, student, adapters = self.given(calibration), self.network(parent), self.adapters()
        with speaking_of_compression():
            adapters.attach(student, seed=seed, low_precision=self.placement().low)
        learning = self.train(student, parent, text, seed)
        adapters.merge(student)
        tensors = like_parent(student, parent)
        return Compressed(parent.config, tensors, cost=learning.cost, curves=learning.curves)
