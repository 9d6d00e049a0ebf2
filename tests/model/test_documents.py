"""Several documents in a row: each as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.decoder import Decoder
from tests.tiny import GEMMA, decoder, lstm, shape

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """Multi-head and grouped-query attention; windows narrower and wider than a document, in all layers or in some."""
    kv_heads = draw(st.sampled_from([1, 2]))
    heads, window = kv_heads * draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 30]))
    changes: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"qkv_bias": True, "tied_head": False},
                {"sliding_window": window},
                {**GEMMA, "sliding_window": window, "layer_types": MIXED, "local_rope_theta": 100.0},
            ]
        )
    )
    return shape(**{"layers": 3, "hidden_size": heads * 8, "heads": heads, "kv_heads": kv_heads, **changes})


def packed(rows: list[list[int]], width: int) -> torch.Tensor:
    """Documents of given lengths one after the other, padding at the end: (B, T)."""
    numbered = [[n for n, length in enumerate(row) for _ in range(length)] for row in rows]
    return torch.tensor([row + [-1] * (width - len(row)) for row in numbered], dtype=torch.int32)


def alone(model: Decoder, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """What each document of a row gives by itself, put together; zeros at padding: (B, T, hidden)."""
    rows = []
    for row, owners in zip(ids, documents, strict=True):
        numbers = [n for n in owners.unique().tolist() if n >= 0]
        parts = [model.hidden(row[owners == n][None])[0] for n in numbers]
        rows.append(torch.cat([*parts, parts[0].new_zeros(int((owners < 0).sum()), parts[0].shape[1])]))
    return torch.stack(rows)


LENGTHS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(config=shapes(), rows=LENGTHS, padding=st.integers(0, 4), seed=st.integers(0, 999))
def test_each_document_of_a_row_is_computed_as_if_it_were_alone(
    config: ModelConfig, rows: list[list[int]], padding: int, seed: int
) -> None:
    model = decoder(config, seed, spread=0.2)
    documents = packed(rows, max(map(sum, rows)) + padding)
    ids = torch.randint(100, documents.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        together = model.hidden(ids, documents=documents)
        expected = alone(model, ids, documents)
    assert torch.isfinite(together).all()  # padding too: it attends to itself
    real = documents >= 0
    assert torch.allclose(together[real], expected[real], rtol=0, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(config=shapes(), rows=LENGTHS, padding=st.integers(0, 3), seed=st.integers(0, 999))
def test_gradients_are_the_sum_of_those_of_each_document_alone(
    config: ModelConfig, rows: list[list[int]], padding: int, seed: int
) -> None:
    model = decoder(config, seed, spread=0.2)
    documents = packed(rows, max(map(sum, rows)) + padding)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, documents.shape, generator=generator)
    slope = torch.randn(*documents.shape, config.hidden_size, generator=generator) * (documents >= 0)[..., None]
    parameters = list(model.model.parameters())
    together = torch.autograd.grad((model.hidden(ids, documents=documents) * slope).sum(), parameters)
    apart = torch.autograd.grad((alone(model, ids, documents) * slope).sum(), parameters)
    largest = max(float(gradient.abs().max()) for gradient in apart)
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}], ids=["full", "sliding"])
def test_one_document_is_what_no_documents_are(changes: dict[str, Any]) -> None:
    model, ids = decoder(shape(**changes)), torch.randint(100, (2, 20))
    with torch.inference_mode():
        whole = model.hidden(ids)
        assert torch.allclose(model.hidden(ids, documents=torch.zeros_like(ids)), whole, atol=1e-5)
        halves = model.hidden(ids, documents=(torch.arange(20) >= 10).expand(2, -1).int())
    assert torch.allclose(halves[:, :10], whole[:, :10], atol=1e-5)
    assert not torch.allclose(halves[:, 10:], whole[:, 10:], atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_document_far_from_the_start_of_its_row_is_no_worse(dtype: torch.dtype, tolerance: float) -> None:
    """The kernel reads keys in blocks of hundreds, of which some are hidden altogether from the last document."""
    model = decoder(shape(layers=1, context=2048), spread=0.2)
    documents = packed([[1100, 1, 50]], 1151)
    ids = torch.randint(100, documents.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.hidden(ids[:, 1101:])
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            found = model.hidden(ids, documents=documents)[:, 1101:]
    assert torch.allclose(found.float(), expected, rtol=0, atol=tolerance)


def test_an_lstm_refuses_documents_with_the_option_to_change() -> None:
    model, ids = lstm(), torch.ones(1, 4, dtype=torch.int64)
    assert decoder().separates_documents and not model.separates_documents
    with pytest.raises(UserError, match=r"set training\.documents_apart=false"):
        model.hidden(ids, documents=torch.zeros_like(ids))
