"""Products of engine `compiled`: exactly the variant's integers, with activations as they are or rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.compiled.kernels import Packed, Product, load
from hasten.engine.compiled.matrices import INT4_GROUPS, Int4, Int8, rounded, summed
from hasten.engine.native import build
from hasten.errors import UserError
from hasten.model.grid import Grid, dequantise, portable_scale

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


def random_integers(rows: int, columns: int, grid: Grid, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), generator=generator).to(torch.int8)
    return q, portable_scale(torch.rand(rows, grid.groups(columns), generator=generator) / 50 + 1e-6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    group=st.sampled_from([0, *INT4_GROUPS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_torchs_kernels_multiply_with_exactly_our_integers(
    rows: int, groups: int, group: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    """The identity brings every weight to light, one by one: what is summed with zeros is not rounded."""
    columns, grid = groups * (group or 8), Grid(4 if group else 8, group)
    q, scale = random_integers(rows, columns, grid, seed)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).to(dtype) if biased else None
    matrix = (Int4 if group else Int8)(q, scale, bias, dtype)
    expected = dequantise(q, scale).to(dtype).T
    for x in (torch.eye(columns, dtype=dtype), torch.eye(columns, dtype=dtype)[-1:]):  # many rows, and one
        found = matrix(x)
        assert torch.equal(found, expected[-len(x) :] if bias is None else expected[-len(x) :] + bias)


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 256), Grid(8, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantised_matrix(grid: Grid, dtype: torch.dtype) -> None:
    q, scale = random_integers(48, 512, grid, 3)
    matrix = (Int4 if grid.bits == 4 else Int8)(q, scale, None, dtype)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ dequantise(q, scale).double().T
    for rows in (5, 1):
        error = (matrix(x[:rows]).double() - exact[:rows]).abs().max() / exact.abs().max()
        assert error < (1e-6 if dtype is torch.float32 else 2**-8)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(2, 20),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rounded_activations_are_multiplied_as_float64_would(
    tokens: int, rows: int, columns: int, biased: bool, seed: int
) -> None:
    """To the nearest of 127 steps of a token's largest; then exactly, but for scales and sums in float32."""
    q, scale = random_integers(rows, columns, Grid(8, 0), seed)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    x[0] *= 1e4  # one token's scale is no other's
    x[-1] *= seed % 3  # nor need a token be anything but zeros
    integers, steps = rounded(x)
    largest = x.double().abs().amax(-1, keepdim=True)
    near = integers.double() * steps.double()
    assert torch.allclose(steps.double(), largest / 127, rtol=1e-6, atol=1e-30)
    assert bool(((near - x).abs() <= largest / 127 * 0.50001).all())
    assert integers.dtype is torch.int8
    matrix = Int8(q, scale, bias if biased else None, torch.float32, Product.rounded)
    found = matrix(x).double()
    terms = near @ dequantise(q, scale).double().T, bias.double() if biased else torch.zeros(rows).double()
    assert bool(((found - sum(terms)).abs() <= 1e-6 * (terms[0].abs() + terms[1].abs()) + 1e-30).all())
    exact = x[:1].double() @ dequantise(q, scale).double().T + terms[1]  # one by itself is not rounded
    assert torch.allclose(matrix(x[:1]).double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20),
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    grid=st.sampled_from([Grid(bits, group) for bits in (4, 8) for group in (0, 32, 96)]),
    biased=st.booleans(),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_our_own_kernels_multiply_as_float64_would(
    cache: Path, tokens: int, rows: int, groups: int, grid: Grid, biased: bool, threads: int, seed: int
) -> None:
    """Every 32 values to 127 steps of their largest; one in the middle of two steps may go to the other one."""
    load(cache)
    columns = groups * (grid.group_size or 24)
    q, scale = random_integers(rows, columns, grid, seed)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    x[0] *= 1e4  # one token's scales are no other's
    stretches = torch.nn.functional.pad(x, (0, -columns % 32)).view(tokens, -1, 32)
    step = stretches.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    near = ((stretches / step).round() * step).flatten(1)[:, :columns].double()
    weight = dequantise(q, scale).double()
    expected = near @ weight.T + (bias.double() if biased else 0)
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    found = Packed(q, scale, bias if biased else None, grid.bits)(x).double()
    torch.set_num_threads(before)
    assert found.shape == expected.shape
    size = near.abs() @ weight.abs().T + bias.abs()
    assert bool(((found - expected).abs() <= 1e-5 * size).double().mean() > 0.9)
    assert bool(((found - expected).abs() <= size / 50).all())


@pytest.mark.parametrize("rows", [1, 3, 4, 10])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_rows_are_summed_several_at_a_time(rows: int, dtype: torch.dtype) -> None:
    matrix = random_integers(rows, 40, Grid(8, 0), rows)[0].to(dtype)
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(summed(matrix, x).double(), x.double() @ matrix.double().T, rtol=1e-5, atol=1e-3)


def test_scales_that_16_bits_do_not_hold_are_refused() -> None:
    with pytest.raises(UserError, match="scales must be exact in bfloat16, got some that are not"):
        Int8(torch.ones(2, 8, dtype=torch.int8), torch.full((2, 1), 1 / 3), None, torch.bfloat16)
