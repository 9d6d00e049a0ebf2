"""The native engine's attention, alone against float64, and what an engine answers whose KV cache holds integers."""

from __future__ import annotations

import ctypes
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.engine.base import Dtype, Request
from hasten.engine.native import Native
from hasten.engine.native import build as kernels
from hasten.engine.native.loaded import KEPT
from hasten.model.huggingface import load_network
from tests.engine import llama
from tests.engine.llama import far_from_best, ids, prompt

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="needs a C++ compiler")
ERRORS = {Dtype.float32: 2e-6, Dtype.float16: 1e-3, Dtype.int8: 1e-3}
"""Of the root of the mean square, at most, beyond the 8 bits that are meant (a weight may fall to the other side)."""
CONTEXT = 320


class Sizes(ctypes.Structure):
    """`Attention::Sizes` of cpp/attention.hpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "slots", "heads", "kv_heads", "width", "context", "threads")),
        ("kept", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


@dataclass
class Tokens:
    """Of sequences of these lengths, one behind the other, in the slots that they have in turn."""

    heads: int
    kv_heads: int
    width: int
    lengths: list[int]
    window: int = 0
    seed: int = 0
    places: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.places = [(slot, position) for slot, length in enumerate(self.lengths) for position in range(length)]
        heads = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(len(self.places), count, self.width) for count in heads]
        self.queries, self.keys, self.values = (torch.randn(shape, generator=generator) for shape in shapes)
        self.keys[..., 0] *= 8  # a column that is larger than the others, as keys have it
        self.scale = self.width**-0.5

    def computed(self, functions: ctypes.CDLL, kept: Dtype, passes: list[list[int]], threads: int = 1) -> Tensor:
        """passes: tokens that go together, by their numbers."""
        sizes = Sizes(1, len(self.lengths), self.heads, self.kv_heads, self.width, CONTEXT, threads)
        sizes.kept, sizes.scale = KEPT.index(kept), self.scale
        order = [token for together in passes for token in together]
        inputs = torch.tensor([[0, *self.places[token], -1] for token in order], dtype=torch.int32)
        ends = torch.tensor([len(together) for together in passes]).cumsum(0).tolist()
        ordered = [tensor[order].contiguous() for tensor in (self.queries, self.keys, self.values)]
        out, found = torch.empty_like(ordered[0]), torch.empty_like(ordered[0])
        addresses = [tensor.data_ptr() for tensor in (*ordered, out)]
        arguments = (inputs.data_ptr(), (ctypes.c_int32 * len(ends))(*ends), len(ends), *addresses)
        functions.hasten_attend(ctypes.byref(sizes), self.window, *arguments)
        found[order] = out
        return found

    def expected(self, kept: Dtype = Dtype.float32) -> Tensor:
        """By the formula, in float64, with 8 bits where they are meant: queries and keys by 32 columns, a whole value,
        and the weights of 32 positions, each with its value's scale in it.
        """
        integers = kept is Dtype.int8
        parts, first = [], 0
        for length in self.lengths:
            q, k, v = (x[first : first + length].double() for x in (self.queries, self.keys, self.values))
            if integers:
                q, k, v = rounded(q, 32), rounded(k, 32), rounded(v, self.width)
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (k, v))
            distance = torch.arange(length)[:, None] - torch.arange(length)
            seen = (distance >= 0) & (distance < (self.window or length))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            if integers:
                steps = v.abs().amax(-1).T[:, None] / 127
                weights = rounded(weights * steps, 32, 255) / steps
            parts.append(torch.einsum("hqk,khd->qhd", weights, v))
            first += length
        return torch.cat(parts)


def rounded(x: Tensor, group: int, largest: int = 127) -> Tensor:
    """Along the last dimension, each group to whole multiples of its largest / `largest`."""
    parts = []
    for part in x.float().split(group, dim=-1):
        most = part.abs().amax(-1, keepdim=True)
        parts.append((part * (largest / most)).round().nan_to_num().double() * most / largest)
    return torch.cat(parts, dim=-1)


@pytest.fixture(scope="module")
def functions(cache: Path) -> ctypes.CDLL:
    return kernels.load(cache)


@st.composite
def tokens(draw: st.DrawFn) -> Tokens:
    kv_heads = draw(st.integers(1, 3))
    return Tokens(
        heads=kv_heads * draw(st.sampled_from((1, 2, 3, 4, 8))),
        kv_heads=kv_heads,
        width=draw(st.sampled_from((6, 16, 24, 48, 64, 128))),
        lengths=draw(st.lists(st.integers(1, 90), min_size=1, max_size=3)),
        window=draw(st.sampled_from((0, 1, 5, 16, 40))),
        seed=draw(st.integers(0, 99)),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@settings(max_examples=30, deadline=None)
@given(given_tokens=tokens(), kept=st.sampled_from(KEPT), size=st.integers(1, 80), threads=st.integers(1, 5))
def test_it_is_the_formula_and_a_tokens_company_changes_no_bit(
    functions: ctypes.CDLL, given_tokens: Tokens, kept: Dtype, size: int, threads: int
) -> None:
    """Alone, in passes of any size that take up several sequences, and shared by threads."""
    count = len(given_tokens.places)
    alone = given_tokens.computed(functions, kept, [[token] for token in range(count)])
    assert relative(alone, given_tokens.expected(kept)) < ERRORS[kept]
    passes = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
    assert torch.equal(given_tokens.computed(functions, kept, passes, threads), alone)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("window", [0, 100])
def test_a_long_context_adds_no_error(functions: ctypes.CDLL, kept: Dtype, window: int) -> None:
    long = Tokens(heads=4, kv_heads=2, width=64, lengths=[CONTEXT], window=window)
    found = long.computed(functions, kept, [list(range(CONTEXT))], threads=2)
    assert relative(found[-20:], long.expected(kept)[-20:]) < ERRORS[kept]
    assert relative(found[-20:], long.expected()[-20:]) < max(ERRORS[kept], 0.04 * (kept is Dtype.int8))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("window", [0, 7])
def test_what_lies_behind_a_token_is_not_read(functions: ctypes.CDLL, kept: Dtype, window: int) -> None:
    """Neither what another sequence left in the slot nor a later token of the same pass, even if it is no number."""
    clean = Tokens(heads=4, kv_heads=2, width=32, lengths=[60], window=window)
    expected = clean.computed(functions, kept, [list(range(60))])
    clean.keys[30:], clean.values[30:] = torch.nan, torch.inf
    together = clean.computed(functions, kept, [list(range(60))])
    left_behind = clean.computed(functions, kept, [list(range(25, 60)), list(range(25))])
    assert torch.equal(together[:30], expected[:30])
    assert torch.equal(left_behind[:25], expected[:25])
    assert not torch.isfinite(together[30:]).any()


def test_a_column_far_larger_than_others_spoils_no_other_group(functions: ctypes.CDLL) -> None:
    apart = Tokens(heads=2, kv_heads=2, width=128, lengths=[50])
    apart.keys[..., 0] *= 100
    apart.queries[..., :32] = 0
    assert relative(apart.computed(functions, Dtype.int8, [list(range(50))]), apart.expected()) < 0.02


INTEGERS = {"threads": 1, "weight_dtype": Dtype.float32, "activation_dtype": Dtype.float32, "max_context": 256,
            "kv_cache_dtype": Dtype.int8}  # fmt: skip
NEAR = 0.6
"""By how much a logit of these random networks, whose logits are some ten apart, may move."""


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_greedy_answers_from_integers_are_near_the_networks(tmp_path: Path, cache: Path, name: str) -> None:
    variant = llama.variant(tmp_path / "v", llama.CASES[name])
    model = load_network(variant).eval()
    with closing(Native(**INTEGERS, micro_batch=48).load(variant, cache)) as engine:
        for length in (1, 40, 200):
            found = ids(engine.submit(Request(0, prompt(length, length), 24)))
            assert far_from_best(model, prompt(length, length), found) < NEAR
            assert len(set(found)) > 4


def test_a_cache_of_integers_shares_passes_checks_guesses_and_counts_its_bytes(tmp_path: Path, cache: Path) -> None:
    config = llama.shape(head_size=40)
    variant = llama.variant(tmp_path / "v", config)
    requests = [Request(i, prompt(1 + 7 * i % 61, i % 3) * 2, 5 + i % 20, seed=i) for i in range(24)]
    with closing(Native(**INTEGERS).load(variant, cache)) as engine:
        alone = [ids(engine.submit(request)) for request in requests]
        per_head = 40 + 2 * 4 + 48 + 4  # keys, two scales of theirs, values in whole vectors, their scale
        assert engine.kv_bytes_per_position == config.layers * config.kv_heads * per_head
        assert engine.memory()["kv_cache"] == 256 * engine.kv_bytes_per_position
    with closing(Native(**INTEGERS, slots=6, micro_batch=24, guesses=3).load(variant, cache)) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [ids(stream) for stream in streams] == alone
        assert engine.guessed()[1] > 0
