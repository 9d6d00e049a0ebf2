from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.compression.shared.quantiser import FACTORS, Scale, chosen_scale, group_errors, nearest_scale
from hasten.model.grid import Grid, dequantise, portable_scale, quantise


def drawn(*size: int, seed: int = 0) -> Tensor:
    """Normal, with a tail."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) ** 3


def rounding_error(weight: Tensor, scale: Tensor, grid: Grid, metric: Tensor | None = None) -> Tensor:
    return group_errors(dequantise(quantise(weight, scale, grid), scale) - weight, grid, metric)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 8, 32]),
    how=st.sampled_from(Scale),
    weighed=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_a_search_is_never_worse_than_nearest_and_its_scales_are_portable(
    bits: int, group_size: int, how: Scale, weighed: int, seed: int
) -> None:
    grid, weight, x = Grid(bits, group_size), drawn(5, 64, seed=seed), drawn(80, 64, seed=seed + 1)
    metric = [None, x.square().sum(0), x.T @ x][weighed]
    scale = chosen_scale(weight, grid, how, metric)
    nearest = nearest_scale(weight, grid)
    assert torch.equal(scale.abs(), portable_scale(scale.abs()))
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)
    assert (rounding_error(weight, scale, grid, metric) <= rounding_error(weight, nearest, grid, metric) + 1e-6).all()
    if how is Scale.nearest:
        assert torch.equal(scale, nearest)
    if how is not Scale.signed:
        assert (scale > 0).all()


def test_a_search_finds_the_best_of_its_candidates() -> None:
    grid, weight = Grid(4, 16), drawn(6, 32)
    full = weight.view(6, 2, 16).abs().amax(-1) / 7.5
    candidates = [portable_scale(full * factor) for factor in FACTORS]
    errors = torch.stack([rounding_error(weight, scale, grid) for scale in candidates])
    found = rounding_error(weight, chosen_scale(weight, grid, Scale.search), grid)
    torch.testing.assert_close(found, errors.amin(0))
    assert found.sum() < 0.9 * rounding_error(weight, nearest_scale(weight, grid), grid).sum()


def test_a_negative_scale_puts_a_positive_outlier_on_the_longer_end() -> None:
    weight = torch.tensor([[8.0, 7, -7, 3, 1, -5, 2, 0]])
    scale = chosen_scale(weight, Grid(4, 0), Scale.signed)
    assert scale.item() == -1
    assert torch.equal(dequantise(quantise(weight, scale, Grid(4, 0)), scale), weight)
    assert rounding_error(weight, chosen_scale(weight, Grid(4, 0), Scale.search), Grid(4, 0)).item() > 0


@pytest.mark.parametrize("group_size", [0, 8])
def test_group_errors_are_squares_weighed_squares_or_errors_of_the_output(group_size: int) -> None:
    grid, difference, x = Grid(4, group_size), drawn(3, 16).double(), drawn(20, 16, seed=1).double()
    width = group_size or 16
    parts = [slice(at, at + width) for at in range(0, 16, width)]
    weights = x.square().sum(0)
    expected = {
        "plain": [difference[:, part].square().sum(1) for part in parts],
        "columns": [(difference[:, part].square() * weights[part]).sum(1) for part in parts],
        "outputs": [(x[:, part] @ difference[:, part].T).square().sum(0) for part in parts],
    }
    for metric, name in ((None, "plain"), (weights, "columns"), (x.T @ x, "outputs")):
        torch.testing.assert_close(group_errors(difference, grid, metric), torch.stack(expected[name], 1))
