"""The optimiser: Muon for the blocks' matrices, AdamW for the rest; or AdamW for all.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
arXiv:2502.16982) replaces a matrix's momentum by the nearest orthogonal matrix, so that no few
directions dominate a step. It learns faster per step at about the same cost, which is what makes
minutes on two cores enough: `python benchmarks/fits.py` measures both side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hasten.training.options import Optimiser, Training


def build_optimiser(model: nn.Module, options: Training) -> torch.optim.Optimizer:
    """The optimiser over whatever of `model` is trainable. Norms and the embedding are not decayed."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.dim() >= 2 and "embed" not in name and "lm_head" not in name]
    embeddings = [p for name, p in named if p.dim() >= 2 and ("embed" in name or "lm_head" in name)]
    vectors = [p for _, p in named if p.dim() < 2]
    plain = [{"params": group, "weight_decay": 0.0} for group in (embeddings, vectors) if group]
    muon = options.optimiser is Optimiser.muon and matrices
    if not muon and matrices:
        plain.insert(0, {"params": matrices, "weight_decay": options.weight_decay})
    parts: list[torch.optim.Optimizer] = []
    if plain:
        betas = (options.beta1, options.beta2)
        parts.append(torch.optim.AdamW(plain, lr=options.learning_rate, betas=betas, fused=True))
    if muon:
        parts.append(
            torch.optim.Muon(
                matrices,
                lr=options.learning_rate,
                weight_decay=options.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",  # updates of AdamW's size, so that one learning rate serves both
            )
        )
    return parts[0] if len(parts) == 1 else Together(parts)


class Together(torch.optim.Optimizer):
    """Several optimisers over different parameters that step as one; schedulers see all their groups."""

    def __init__(self, optimisers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimisers = list(optimisers)
        groups = list(itertools.chain.from_iterable(o.param_groups for o in self.optimisers))
        super().__init__([{"params": list(group["params"])} for group in groups], {})
        self.param_groups = groups  # the very same, so that a changed learning rate reaches its owner

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimiser in self.optimisers:
            optimiser.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimiser, state in zip(self.optimisers, state_dict["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.param_groups = list(itertools.chain.from_iterable(o.param_groups for o in self.optimisers))
