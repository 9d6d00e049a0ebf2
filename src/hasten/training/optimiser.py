"""The optimiser: Muon for the blocks' matrices, AdamW for the rest; or AdamW for all. And its learning rate.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; Liu et al. 2025,
arXiv:2502.16982) replaces a matrix's momentum by the nearest orthogonal matrix, so that no few
directions dominate a step. It learns faster per step at about the same cost, which is what makes
minutes on two cores enough: `python benchmarks/fits.py` measures both side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hasten.training.options import Optimiser, Training


def learning_rate_factor(step: int, steps: int, options: Training) -> float:
    """Linear warm-up, then a cosine down to the final fraction (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    warmup = max(1, round(options.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    low = options.final_learning_rate_fraction
    return low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2


def build_optimiser(model: nn.Module, options: Training) -> torch.optim.Optimizer:
    """The optimiser over whatever of `model` is trainable. Norms and the embedding are not decayed."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.dim() >= 2 and "embed" not in name and "lm_head" not in name]
    embeddings = [p for name, p in named if p.dim() >= 2 and ("embed" in name or "lm_head" in name)]
    # Tensor parallelism spreads a block's biases and head norms, not its other norms, and one kernel call takes either.
    norms = [p for name, p in named if p.dim() < 2 and ("layernorm" in name or name == "model.norm.weight")]
    spread = [p for name, p in named if p.dim() < 2 and not ("layernorm" in name or name == "model.norm.weight")]
    plain = [{"params": group, "weight_decay": 0.0} for group in (embeddings, norms, spread) if group]
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
    """Several optimisers over different parameters that step as one and keep one state: schedulers see all their
    groups, and a checkpoint, sharded or not, is that of one optimiser.
    """

    def __init__(self, optimisers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimisers = list(optimisers)
        groups = list(itertools.chain.from_iterable(o.param_groups for o in self.optimisers))
        super().__init__([{"params": list(group["params"])} for group in groups], {})
        self.param_groups = groups  # the very same, so that a changed learning rate reaches its owner
        self._share()

    def _share(self) -> None:
        """Let the members work on the common state and groups."""
        groups = iter(self.param_groups)
        for optimiser in self.optimisers:
            optimiser.state = self.state
            optimiser.param_groups = list(itertools.islice(groups, len(optimiser.param_groups)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimiser in self.optimisers:
            optimiser.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
