"""Distillation: a student learns what its teacher predicts, not only which token came next.

A teacher's probabilities say of every token of the vocabulary how likely it was, so each position teaches more than its
one right answer (Hinton et al. 2015, arXiv:1503.02531). The loss of a position is

    T^2 KL(p || q) + hard_weight * -log q1[next token] + hidden_weight * mean over layers |s - t|^2 / |t|^2

p and q are the teacher's and the student's softmax at temperature T, q1 the student's at 1; T^2 keeps gradients of
one size whatever T is. s and t are what corresponding blocks hand on (Muralidharan et al. 2024, arXiv:2407.14679).
Losses of positions are averaged by their weight. Logits of both exist for a few positions at a time, as in
`hasten.training.loss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hasten.artifacts import Checkpoint, Variant, load_checkpoint
from hasten.errors import UserError
from hasten.training.data import Batch

if TYPE_CHECKING:
    from hasten.model.decoder import Decoder

ENTRIES = 2**22
"""Logits of one network that exist at the same time: 512 positions of a vocabulary of 8,192, 16 of one of 262,144."""


class Distillation:
    """The loss of a batch. pairs: which of the student's blocks answers to which of the teacher's, if states count.

    Raises `UserError` if the networks cannot be compared.
    """

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        pairs: Sequence[tuple[int, int]],
        *,
        temperature: float,
        hidden_weight: float,
        hard_weight: float,
    ) -> None:
        ours, theirs = student.config, teacher.config
        if ours.vocab_size != theirs.vocab_size:
            raise UserError(
                f"compression.teacher must have the parent's vocabulary of {ours.vocab_size} tokens, got one of "
                f"{theirs.vocab_size}"
            )
        if hidden_weight and ours.hidden_size != theirs.hidden_size:
            raise UserError(
                f"compression.hidden_weight must be 0 for a teacher of another width, got {hidden_weight} for widths "
                f"{ours.hidden_size} and {theirs.hidden_size}"
            )
        self.student, self.teacher, self.pairs = student, teacher, list(pairs)
        self.temperature, self.hidden_weight, self.hard_weight = temperature, hidden_weight, hard_weight

    def __call__(self, batch: Batch) -> Tensor:
        """() float32. Logits and states are compared only where a token counts."""
        ids, documents, weights = batch["ids"], batch["documents"], batch["weights"][:, 1:]
        counted = weights > 0  # (B, T - 1)
        weight = weights[counted]  # (N,)
        with torch.no_grad(), watched(self.teacher, [theirs for _, theirs in self.pairs]) as wanted:
            aim = self.teacher.hidden(ids, documents=documents)[:, :-1][counted]  # (N, hidden)
        with watched(self.student, [ours for ours, _ in self.pairs]) as found:
            hidden = self.student.hidden(ids, documents=documents)[:, :-1][counted]
        total: Tensor = LinearDistillation.apply(  # type: ignore[no-untyped-call]
            hidden,
            self.student.lm_head.weight,
            aim,
            self.teacher.lm_head.weight,
            ids[:, 1:][counted],
            weight,
            self.temperature,
            self.hard_weight,
        )
        for ours, theirs in self.pairs:
            s, t = (states[:, :-1][counted] for states in (found[ours], wanted[theirs]))
            missed = (s - t).square().sum(-1) / t.square().sum(-1)  # (N,)
            total = total + self.hidden_weight / len(self.pairs) * (missed * weight).sum()
        return total / batch["total"]


class LinearDistillation(torch.autograd.Function):
    """hidden (N, H), head (V, H), teacher's hidden (N, G), its head (V, G), targets (N,), weights (N,), temperature,
    hard_weight -> the sum of weighted losses, float32 (float64 for such states).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        aim: Tensor,
        aim_head: Tensor,
        targets: Tensor,
        weights: Tensor,
        temperature: float,
        hard_weight: float,
    ) -> Tensor:
        kind, precise = hidden.device.type, torch.promote_types(hidden.dtype, torch.float32)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        x, w, y, v = (value.to(dtype) for value in (hidden, head, aim, aim_head))
        grad_hidden = torch.empty_like(x)
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=hidden.device, dtype=precise)
        chunk = max(16, ENTRIES // len(w))
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(x), chunk):
                rows = slice(start, start + chunk)
                target, weight = targets[rows, None], weights[rows, None]  # (C, 1)
                logits = (x[rows] @ w.T).to(precise)  # (C, V)
                log_q = (logits / temperature).log_softmax(-1)
                log_p = ((y[rows] @ v.T).to(precise) / temperature).log_softmax(-1)
                p = log_p.exp()
                total += temperature**2 * (log_p.sub_(log_q).mul_(p) * weight).sum()
                slope = log_q.exp_().sub_(p).mul_(temperature)  # T^2 d KL / d logits = T (q - p)
                if hard_weight:
                    log_q1 = logits.log_softmax(-1)
                    total -= hard_weight * (log_q1.gather(1, target) * weight).sum()
                    minus_one = torch.full_like(target, -1, dtype=precise)
                    slope.add_(log_q1.exp_().scatter_add_(1, target, minus_one), alpha=hard_weight)
                low = slope.mul_(weight).to(dtype)
                torch.mm(low, w, out=grad_hidden[rows])
                if grad_head is not None:
                    grad_head += low.T @ x[rows]
        ctx.gradients, ctx.dtype = (grad_hidden, grad_head), hidden.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden, grad_head), slope = ctx.gradients, grads[0]
        del ctx.gradients  # they are scaled in place, so nobody may come back for them
        return (
            grad_hidden.to(ctx.dtype) * slope,
            None if grad_head is None else grad_head.mul_(slope),
            *[None] * 6,
        )


@contextmanager
def watched(model: Decoder, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What these blocks hand on in a pass made meanwhile, by block: (B, T, hidden)."""
    seen: dict[int, Tensor] = {}

    def watch(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: Any, output: Tensor) -> None:
            seen[layer] = output

        return model.model.layers[layer].register_forward_hook(hook)

    handles = [watch(layer) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def matching(student: Checkpoint, teacher: Checkpoint) -> list[tuple[int, int]]:
    """Each of a student's blocks with the one of its ancestor, the teacher, that it comes from.

    Depth pruning says which are left. Where that does not account for the student's depth, blocks match by their share
    of it.
    """
    layers, left = (int(one.config["num_hidden_layers"]) for one in (teacher, student))
    origins = list(range(layers))
    for variant in descent(student, teacher):
        if variant.manifest["method"] == "depth":
            dropped = variant.manifest["notes"]["dropped"]
            origins = [layer for place, layer in enumerate(origins) if place not in dropped]
    if len(origins) != left:
        origins = [round((place + 1) * layers / left) - 1 for place in range(left)]
    return list(enumerate(origins))


def descent(student: Checkpoint, teacher: Checkpoint) -> list[Checkpoint]:
    """The variants after the teacher, down to the student."""
    if not isinstance(student, Variant) or not isinstance(teacher, Variant):
        return []
    names = student.lineage[student.lineage.index(teacher.name) + 1 :]
    return [load_checkpoint(student.path.parent / name) for name in names]
