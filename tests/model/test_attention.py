from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.model import attention
from hasten.model.attention import MOST_WRITTEN, WrittenDown, attend


def drawn(heads: int, groups: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """q, k and v as a network makes them: (B, H, T, D), not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, tokens, count, 4) for count in (heads * groups, groups, groups)]
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def by_document(tokens: int) -> Tensor:
    """Two rows whose documents end at different places, (B, 1, T, T)."""
    places = torch.arange(tokens)
    documents = torch.stack([places >= 3, places >= 1])
    return (documents[:, :, None] == documents[:, None, :])[:, None] & (places[:, None] >= places)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    groups=st.integers(1, 2),
    tokens=st.integers(1, 6),
    masked=st.sampled_from(["no", "T", "B"]),
)
def test_written_down_it_is_torchs_to_the_precision_of_doubles(
    heads: int, groups: int, tokens: int, masked: str
) -> None:
    q, k, v = drawn(heads, groups, tokens, torch.float64)
    mask = {"no": None, "T": torch.ones(tokens, tokens, dtype=torch.bool).tril(), "B": by_document(tokens)}[masked]
    ours = WrittenDown.apply(q, k, v, mask, 0.3)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    slope = torch.randn_like(wanted)
    assert torch.allclose(ours, wanted, atol=1e-12)
    for mine, torchs in zip(*(torch.autograd.grad(out, [q, k, v], slope) for out in (ours, wanted)), strict=True):
        assert torch.allclose(mine, torchs, atol=1e-12)


@pytest.mark.parametrize("documents", [False, True])
def test_in_bfloat16_it_errs_no_more_than_twice_as_much_as_the_fused_kernel(documents: bool) -> None:
    exact_in = drawn(2, 2, 64, torch.bfloat16)
    mask = by_document(64) if documents else None
    slope = torch.randn(2, 4, 64, 4)

    def all_of(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> list[Tensor]:
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        else:
            out = attend(q, k, v, mask=mask, causal=mask is None, scale=None)
        return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, [q, k, v], slope.to(q.dtype)))]

    exact = all_of(*(x.detach().double().requires_grad_() for x in exact_in), fused=True)  # type: ignore[misc]
    errors = [
        [float((a - b).norm() / b.norm()) for a, b in zip(all_of(*exact_in, fused=fused), exact, strict=True)]
        for fused in (True, False)
    ]
    assert all(0 < ours < 2 * theirs + 1e-3 for theirs, ours in zip(*errors, strict=True))


class CalledError(Exception):
    pass


def test_scores_are_written_down_only_in_training_in_bfloat16_on_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise CalledError

    monkeypatch.setattr(attention.WrittenDown, "apply", called)

    def way(q: Tensor, k: Tensor, v: Tensor) -> str:
        try:
            attend(q, k, v, mask=None, causal=True, scale=None)
        except CalledError:
            return "written down"
        return "fused"

    low = drawn(1, 1, 8, torch.bfloat16)
    assert way(*low) == "written down"
    assert way(*drawn(1, 1, 8, torch.float32)) == "fused"
    assert way(*drawn(1, 1, MOST_WRITTEN + 1, torch.bfloat16)) == "fused"
    assert way(*(x.detach() for x in low)) == "fused"
    with torch.no_grad():
        assert way(*low) == "fused"
