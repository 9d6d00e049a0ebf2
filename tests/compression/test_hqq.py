from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compression.hqq import Hqq, lost
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.quantiser import nearest_scale
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.grid import Grid, dequantise, integers, portable_scale, quantise, quantised_names
from hasten.model.huggingface import load_network
from tests.tiny import GEMMA, decoder, lstm, shape, write_variant

SHAPES = {"llama": shape(tied_head=False), "tied": shape(), "gemma": shape(layers=3, **GEMMA)}


def heavy(out: int, width: int, seed: int = 0) -> torch.Tensor:
    """Weights with outliers."""
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) ** 3


def norm_of(weight: torch.Tensor, scale: torch.Tensor, grid: Grid, p: float) -> torch.Tensor:
    """The l_p error (to the p) per group, by the library's own rounding."""
    error = (dequantise(quantise(weight, scale, grid), scale) - weight).abs() ** p
    return error.view(*scale.shape, -1).sum(-1)


@settings(max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 8, 32]),
    p=st.sampled_from([0.3, 0.7, 0.95]),
    seed=st.integers(0, 999),
)
def test_no_groups_error_in_its_norm_is_above_that_of_rounding(bits: int, group_size: int, p: float, seed: int) -> None:
    grid, weight = Grid(bits, group_size), heavy(5, 64, seed)
    scale = Hqq(bits=bits, group_size=group_size, norm=p).robust_scale(weight)
    assert torch.equal(scale, portable_scale(scale))
    nearest = nearest_scale(weight, grid)
    assert (norm_of(weight, scale, grid, p) <= norm_of(weight, nearest, grid, p) * (1 + 1e-5)).all()


def test_the_error_falls_with_the_steps_and_by_a_good_part() -> None:
    grid, weight = Grid(4, 32), heavy(64, 128)
    errors = [norm_of(weight, Hqq(steps=n).robust_scale(weight), grid, 0.7).sum() for n in (1, 3, 20)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.95 * norm_of(weight, nearest_scale(weight, grid), grid, 0.7).sum()


def test_a_step_is_the_proximal_step_and_then_least_squares() -> None:
    """Against the two formulas, written out weight by weight."""
    grid, weight, p, beta = Grid(4, 0), heavy(16, 8), 0.7, 10.0
    nearest = nearest_scale(weight, grid)
    steps = []
    for row, first in zip(weight.tolist(), nearest.flatten().tolist(), strict=True):
        above = below = 0.0
        for value in row:
            w = value / first
            q = max(-8, min(7, round(w)))
            r = w - q
            e = 0.0 if r == 0 else (1 if r > 0 else -1) * max(abs(r) - abs(r) ** (p - 1) / beta, 0)
            above, below = above + (w - e) * q, below + q * q
        steps.append([first * above / below])
    stepped = portable_scale(torch.tensor(steps))
    better = norm_of(weight, stepped, grid, p) < norm_of(weight, nearest, grid, p)
    assert 4 <= better.sum() < 16  # some steps are kept, some are not
    found = Hqq(group_size=0, steps=1).robust_scale(weight)
    torch.testing.assert_close(found, torch.where(better, stepped, nearest), rtol=2**-7, atol=0)


def test_what_is_counted_is_the_norm_of_the_weights_errors() -> None:
    grid, weight = Grid(4, 8), heavy(3, 16)
    scale = nearest_scale(weight, grid)
    torch.testing.assert_close(lost(weight.view(3, 2, 8), scale, grid, 0.7), norm_of(weight, scale, grid, 0.7))


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_a_group_of_nothing_is_stored_as_zeros(value: float) -> None:
    weight = torch.full((2, 16), value)
    scale = Hqq(group_size=8).robust_scale(weight)
    assert (dequantise(quantise(weight, scale, Grid(4, 8)), scale) == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_every_option_survives_compress_save_load_generate(
    tmp_path: Path, family: str, bits: int, group_size: int, head: bool
) -> None:
    parent = write_variant(tmp_path / "baseline", decoder(SHAPES[family]))
    method = Hqq(bits=bits, group_size=group_size, head=head)
    child, cost = make_variant(method, parent, None, name="q", target=tmp_path / "q", seed=0)
    again, _ = make_variant(method, parent, None, name="q", target=tmp_path / "again", seed=1)
    assert child.hash == again.hash
    assert cost["build_tokens"] == 0
    assert len(quantised_names(child.tensors())) == SHAPES[family].layers * 7 + head
    weight, name = load_network(parent).state_dict()["model.layers.1.mlp.up_proj.weight"], "model.layers.1.mlp.up_proj"
    q, scale = integers(child.tensors(), name, Grid(bits, group_size))
    assert torch.equal(scale, method.robust_scale(weight))
    assert torch.equal(q, quantise(weight, scale, Grid(bits, group_size)))
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


def test_an_lstm_is_welcome_and_a_quantised_parent_is_not(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline", lstm())
    child, _ = make_variant(Hqq(group_size=16), parent, None, name="q", target=tmp_path / "q", seed=0)
    assert len(quantised_names(child.tensors())) == 9
    quantised, _ = make_variant(Rtn(), write_variant(tmp_path / "b"), None, name="r", target=tmp_path / "r", seed=0)
    with pytest.raises(UserError, match=r"hqq needs a float parent, got .* which is already quantised"):
        Hqq().compress(quantised, None, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": 1.0}, r"compression\.norm must lie between 0 and 1, got 1\.0"),
        ({"norm": 0.0}, r"compression\.norm must lie between 0 and 1, got 0\.0"),
        ({"penalty": 0.0}, r"compression\.penalty must be above 0 and finite, got 0\.0"),
        ({"penalty_growth": 0.9}, r"compression\.penalty_growth must be 1 to 10, got 0\.9"),
        ({"steps": 0}, r"compression\.steps must be at least 1, got 0"),
        ({"bits": 2}, r"compression\.bits must be one of \[4, 8\], got 2"),
    ],
)
def test_hqq_refuses_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Hqq(**options)
