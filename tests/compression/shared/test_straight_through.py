from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.compression.shared.quantiser import nearest_scale
from hasten.compression.shared.straight_through import on_grid
from hasten.model.grid import Grid, dequantise, quantise
from tests.tiny import decoder, shape


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(8, 0)])
def test_a_layer_computes_on_the_grid_and_the_weight_behind_gets_the_slope_of_the_rounded_one(grid: Grid) -> None:
    linear, x = nn.Linear(16, 6), torch.randn(5, 16)
    weight = linear.weight.detach().clone()
    scale = nearest_scale(weight, grid)
    rounded = dequantise(quantise(weight, scale, grid), scale).requires_grad_()
    expected = nn.functional.linear(x, rounded, linear.bias)
    expected.square().sum().backward()
    with on_grid([linear], grid):
        y = linear(x)
        y.square().sum().backward()
        behind = dict(linear.named_parameters())["parametrizations.weight.original"]
        assert torch.equal(behind.grad, rounded.grad)
    assert torch.equal(y, expected)
    assert torch.equal(linear.weight, weight)
    assert linear.state_dict().keys() == {"weight", "bias"}
    assert type(linear) is nn.Linear


def test_a_head_of_its_own_starts_as_the_embedding_and_goes_its_own_way() -> None:
    model, tied = decoder(), decoder()
    model.untie()
    assert not model.config.tied_head
    assert torch.equal(model(torch.arange(5)[None]), tied(torch.arange(5)[None]))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (model.model.embed_tokens.weight != 0).any()
    assert decoder(shape(tied_head=False)).config == model.config
