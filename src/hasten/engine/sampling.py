"""How the next token is drawn where a request asks for more than the most likely one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """softmax(logits / temperature), cut to the nucleus and made to sum to 1: (vocabulary,) float64.

    The nucleus is the fewest tokens, the most likely first, that have `top_p` together (Holtzman et al. 2020,
    arXiv:1904.09751). temperature: above 0. top_p: above 0, to 1.
    """
    import torch

    shares = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1:
        ordered, ids = shares.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        shares = torch.zeros_like(shares).scatter(-1, ids, ordered * (before < top_p))
    return shares / shares.sum(-1, keepdim=True)
