from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.compression.shared import sensitivity
from hasten.compression.shared.layerwise import Group, groups
from hasten.compression.shared.quantiser import nearest_scale
from hasten.compression.shared.sensitivity import Rounded, divergence, divergences, rounded
from hasten.model.decoder import Decoder
from hasten.model.grid import Grid, dequantise, quantise
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, shape

GRID = Grid(4, 16)


def scales(units: list[Group], grid: Grid) -> dict[str, torch.Tensor]:
    return {
        name: nearest_scale(linear.weight.detach(), grid)
        for unit in units
        for name, linear in zip(unit.names, unit.linears, strict=True)
    }


@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_is_multiplied_as_its_rounded_weights_would_be(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "ROWS", 24)  # of 80: four parts, the last one smaller
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 80, bias=bias), torch.randn(2, 5, 32)
    scale = nearest_scale(linear.weight.detach(), GRID)
    with torch.no_grad():
        weight = dequantise(quantise(linear.weight, scale, GRID), scale).double()
        expected = x.double() @ weight.T + (linear.bias.double() if bias else 0)
        torch.testing.assert_close(Rounded(linear, scale, GRID)(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {**GEMMA, "layers": 3}], ids=["tied", "own", "gemma"])
def test_the_network_is_what_it_was(changes: dict[str, Any]) -> None:
    model = decoder(shape(**changes))
    assert isinstance(model, Decoder)
    units, before = groups(model, head=True), {name: value.clone() for name, value in model.state_dict().items()}
    found = divergences(model, text(3, 16), units, {GRID: scales(units, GRID)})
    assert len(found) == len(units)
    assert all(value[4] > 0 for value in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), rounded(model, units[-1], scales(units, GRID), GRID):
        assert isinstance(model.lm_head, Rounded)
        raise ZeroDivisionError
    assert all(model.get_submodule(unit.names[0]) is unit.linears[0] for unit in units)


def test_how_many_tokens_are_looked_at_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(shape())
    assert isinstance(model, Decoder)
    units, rows = groups(model, head=True), text(5, 16, documents=2, padding=3)
    found = []
    for at_once, tokens in ((1, 5), (2, 64), (8, 7)):
        monkeypatch.setattr(sensitivity, "AT_ONCE", at_once)
        monkeypatch.setattr(sensitivity, "TOKENS", tokens)
        found.append([value[4] for value in divergences(model, rows, units, {GRID: scales(units, GRID)})])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)


def test_what_is_on_the_grid_already_loses_nothing() -> None:
    model = decoder(shape())
    assert isinstance(model, Decoder)
    units = groups(model, head=False)
    on = scales(units, GRID)
    with torch.no_grad():
        for unit in units:
            for name, linear in zip(unit.names, unit.linears, strict=True):
                linear.weight.copy_(dequantise(quantise(linear.weight, on[name], GRID), on[name]))
    assert all(value[4] == pytest.approx(0, abs=1e-9) for value in divergences(model, text(3, 16), units, {GRID: on}))


def test_divergence_is_that_of_scipys_entropy() -> None:
    from scipy.stats import entropy

    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(7, 50, generator=generator).log_softmax(-1) for _ in range(2))
    expected = float(entropy(p.double().exp().numpy(), q.double().exp().numpy(), axis=1).sum())
    assert divergence(p, q.clone()) == pytest.approx(expected, rel=1e-5)
