"""GPTQ's algebra against the paper's algorithm in float64, one column and one inverse at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.compression.shared.compensation import BLOCK, compensated, inverse_factor
from hasten.compression.shared.quantiser import Scale, chosen_scale
from hasten.compression.shared.rounding import output_error
from hasten.model.grid import Grid, dequantise, quantise


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that depend on each other and differ in size, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    return (x @ (mix + torch.eye(width))) * torch.linspace(0.1, 3, width, dtype=torch.float64)


def matrix(out: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def column_by_column(
    weight: Tensor, scale: Tensor, gram: Tensor, order: list[int], damping: float, grid: Grid
) -> Tensor:
    """Optimal brain quantisation in one order: after each column its row and column leave the inverse (eq. 2, 3)."""
    left, width = weight.double().clone(), weight.shape[1]
    inverse = torch.linalg.inv(gram + damping * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64))
    q = torch.zeros_like(left)
    for done, j in enumerate(order):
        step = scale[:, j * scale.shape[1] // width].double()
        q[:, j] = (left[:, j] / step).round().clamp(grid.lowest, grid.highest)
        error = (left[:, j] - q[:, j] * step) / inverse[j, j]
        rest = order[done + 1 :]
        left[:, rest] -= error[:, None] * inverse[j, rest]
        inverse -= inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return q.to(torch.int8)


@pytest.mark.parametrize("how", Scale)
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "width"), [(4, 16, 48), (8, 0, 40), (4, 8, BLOCK + 40)])
def test_integers_are_those_of_the_papers_algorithm(
    bits: int, group_size: int, width: int, act_order: bool, how: Scale
) -> None:
    grid, weight, x = Grid(bits, group_size), matrix(24, width), correlated(300, width)
    gram = x.T @ x
    scale = chosen_scale(weight, grid, how, gram.diagonal())
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(width)
    factor, damping = inverse_factor(gram[order][:, order], 0.01)
    assert damping == 0.01
    ours = compensated(weight, scale, factor, order, grid)
    theirs = column_by_column(weight, scale, gram, order.tolist(), 0.01, grid)
    assert ours.dtype is torch.int8
    agree = (ours == theirs).float().mean()
    assert agree == 1 or agree > 0.999  # a tie may fall either way, and the row's later columns with it
    lost, reference, plain = (
        output_error(weight.double() - dequantise(q, scale).double(), gram)
        for q in (ours, theirs, quantise(weight, scale, grid))
    )
    assert lost == pytest.approx(reference, rel=1e-3)
    assert lost < 0.95 * plain


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = correlated(100, 24)
    gram = x.T @ x
    factor, _ = inverse_factor(gram, 0.05)
    assert torch.equal(factor, factor.triu())
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-8)


def test_damping_rises_until_the_matrix_can_be_factorised() -> None:
    x = correlated(5, 24)  # fewer tokens than inputs: H is singular
    _, damping = inverse_factor(x.T @ x - 1e-3 * torch.eye(24, dtype=torch.float64), 0.0)
    assert damping > 0
    assert round(torch.tensor(damping).log10().item(), 6).is_integer()  # 1e-6, 1e-5, ...


def test_inputs_that_are_never_used_go_to_nearest_and_leave_the_others_alone() -> None:
    grid, weight, x = Grid(4, 8), matrix(6, 16), correlated(100, 16)
    x[:, [3, 9]] = 0
    order, live = torch.arange(16), [j for j in range(16) if j not in (3, 9)]
    gram = x.T @ x
    scale = chosen_scale(weight, grid, Scale.nearest)
    q = compensated(weight, scale, inverse_factor(gram, 0.01)[0], order, grid)
    nearest = quantise(weight, scale, grid)
    assert torch.equal(q[:, [3, 9]], nearest[:, [3, 9]])
    assert not torch.equal(q, nearest)
    other = weight.clone()
    other[:, [3, 9]] += 0.7
    again = compensated(other, scale, inverse_factor(gram, 0.01)[0], order, grid)
    assert torch.equal(again[:, live], q[:, live])


def test_a_text_that_says_nothing_at_all_leaves_rounding_to_nearest() -> None:
    grid, weight = Grid(4, 8), matrix(6, 16)
    scale, nothing = chosen_scale(weight, grid, Scale.nearest), torch.zeros(16, 16, dtype=torch.float64)
    q = compensated(weight, scale, inverse_factor(nothing, 0.01)[0], torch.arange(16), grid)
    assert torch.equal(q, quantise(weight, scale, grid))
