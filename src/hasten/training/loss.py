"""The loss, computed so that a small model's large vocabulary does not dominate its training.

A head of 8,192 entries turns 4,096 tokens into 134 MB of logits, and a textbook cross-entropy walks
over them half a dozen times; on a CPU that costs as much as the matrix products. Here the logits are
made, turned into losses and into gradients one chunk at a time, so a chunk stays in the cache (the
idea of Wijmans et al. 2024, arXiv:2411.09009, without their kernel). Gradients equal the
textbook's; `python benchmarks/fits.py` times both in turns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hasten.model.network import Network
from hasten.training.data import Batch

CHUNK = 512  # tokens whose logits exist at the same time


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy in nats of each token given those before it, (B, T); 0 at position 0."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return F.pad(losses.view(ids.shape[0], -1), (1, 0))


def weighted_loss(model: Network, batch: Batch) -> Tensor:
    """Weighted cross-entropy of the batch's tokens over the weight of the whole step's: its part of the step's mean.

    Logits are computed only where a token counts.
    """
    ids, weights = batch["ids"], batch["weights"][:, 1:]
    counted = weights > 0  # (B, T - 1)
    hidden = model.hidden(ids, batch["prompt_tokens"], batch.get("documents"))[:, :-1][counted]  # (N, hidden)
    total: Tensor = LinearCrossEntropy.apply(hidden, model.lm_head.weight, ids[:, 1:][counted], weights[counted])  # type: ignore[no-untyped-call]
    return total / batch["total"]


class LinearCrossEntropy(torch.autograd.Function):
    """hidden (N, H), head (V, H), targets (N,), weights (N,) -> sum of weighted losses, float32.

    What a chunk needs is allocated once: on a CPU, fresh pages for every chunk take as long as filling them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        kind, chunk = hidden.device.type, min(CHUNK, len(hidden))
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        x, w = hidden.to(dtype), head.to(dtype)
        logits, precise = x.new_empty(chunk, len(w)), hidden.new_empty(chunk, len(w), dtype=torch.float32)
        grad_hidden, grad_head = torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            grad_head, part, precise_part = torch.zeros_like(head), torch.empty_like(w), torch.empty_like(head)
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(x), CHUNK):
                rows = slice(start, start + CHUNK)
                target, weight = targets[rows, None], weights[rows, None]  # (C, 1)
                product = torch.mm(x[rows], w.T, out=logits[: len(target)])  # (C, V)
                log_p = precise[: len(target)].copy_(product)
                torch.log_softmax(log_p, dim=-1, out=log_p)
                total -= (log_p.gather(1, target) * weight).sum()
                # d loss / d logits = (softmax - one-hot of the target) * weight
                slope = product.copy_(log_p.exp_().mul_(weight).scatter_add_(1, target, -weight))
                torch.mm(slope, w, out=grad_hidden[rows])
                if grad_head is not None:
                    grad_head += precise_part.copy_(torch.mm(slope.T, x[rows], out=part))
        ctx.gradients, ctx.dtype = (grad_hidden, grad_head), hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad_hidden, grad_head), slope = ctx.gradients, grads[0]
        del ctx.gradients  # they are scaled in place, so nobody may come back for them
        return grad_hidden.to(ctx.dtype) * slope, None if grad_head is None else grad_head.mul_(slope), None, None
