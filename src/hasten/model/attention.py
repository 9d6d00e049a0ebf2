"""Which kernel computes attention: torch's, but for training in bfloat16 on a CPU.

Torch's fused kernel keeps scores in the cache instead of in memory (Dao et al. 2022, arXiv:2205.14135). On a CPU its
backward pass in bfloat16 takes two to five times as long as the plain one on rows of up to 512 tokens, whose scores are
small enough to be written down: `python benchmarks/attention.py`.

Shapes: B batch, H heads, K key/value heads, T tokens, S tokens attended to, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_WRITTEN = 512
"""Tokens of a row up to which scores are written down; measured."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """softmax(scale q k') v, (B, H, T, D), for q (B, H, T, D), k and v (B, K, S, D), where K divides H.

    mask: bool (T, S) or (B, 1, T, S), true where a query may look; no row may be empty. scale: 1 / sqrt(D) if None.
    """
    tokens = q.shape[2]
    training = torch.is_grad_enabled() and q.requires_grad
    if training and q.device.type == "cpu" and q.dtype is torch.bfloat16 and tokens == k.shape[2] <= MOST_WRITTEN:
        if causal:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        out: Tensor = WrittenDown.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
        return out
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and tokens == k.shape[2]:
        # CUDA's kernel that takes a mask knows no groups: without this, all scores would be written to memory
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


class WrittenDown(torch.autograd.Function):
    """Attention whose scores exist as a whole, in the type of q; heads that share keys go through one product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        (batch, heads, tokens, width), groups = q.shape, k.shape[0] * k.shape[1]
        q = (q * scale).reshape(groups, -1, width)  # (B*K, H/K*T, D)
        k, v = k.reshape(groups, tokens, width), v.reshape(groups, tokens, width)
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, tokens, tokens)
        if mask is not None:
            scores += torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        shares = torch.softmax(scores, -1, out=scores).view(groups, -1, tokens)
        ctx.save_for_backward(q, k, v, shares)
        ctx.scale, ctx.queries, ctx.keys = scale, (batch, heads, tokens, width), (batch, -1, tokens, width)
        return torch.bmm(shares, v).view(ctx.queries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, shares = ctx.saved_tensors
        grad = grads[0].reshape(q.shape)
        grad_v = torch.bmm(shares.transpose(1, 2), grad)
        grad_shares = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(ctx.scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q.view(ctx.queries), grad_k.view(ctx.keys), grad_v.view(ctx.keys), None, None
