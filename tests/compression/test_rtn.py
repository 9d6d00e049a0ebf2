from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.quantiser import Scale, chosen_scale, is_linear, nearest_scale
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.grid import Grid, dequantise, integers, quantise, quantised_names
from hasten.model.huggingface import load_network
from tests.tiny import decoder, lstm, lstm_shape, shape, write_variant


def made(tmp_path: Path, tied: bool = True, **options: Any) -> tuple[Variant, Variant]:
    """A baseline and its quantised child."""
    parent = write_variant(tmp_path / "baseline", decoder(shape(tied_head=tied), spread=0.1))
    child, _ = make_variant(Rtn(**options), parent, None, name="q", target=tmp_path / "q", seed=0)
    return parent, child


@settings(max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 8, 32]),
    seed=st.integers(0, 999),
    magnitude=st.sampled_from([1e-2, 1.0, 50.0]),
)
def test_every_weight_goes_to_its_nearest_grid_point(bits: int, group_size: int, seed: int, magnitude: float) -> None:
    grid = Grid(bits, group_size)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * magnitude
    scale = nearest_scale(weight, grid)
    assert scale.shape == (4, grid.groups(64))
    q = quantise(weight, scale, grid)
    step = scale.repeat_interleave(64 // scale.shape[1], dim=1)
    error = (dequantise(q, scale) - weight).abs() / step
    inside = (q > grid.lowest) & (q < grid.highest)
    assert (error[inside] <= 0.5 + 1e-4).all()
    # At the ends a weight may lie up to half a step beyond, and the scale was rounded to bfloat16.
    assert (error <= 0.5 + 2**-8 * 2 ** (bits - 1)).all()
    largest = q.int().view(4, scale.shape[1], -1).abs().amax(-1)
    assert (largest >= grid.highest).all()  # the whole grid is used


def test_a_group_of_zeros_is_stored_as_zeros(tmp_path: Path) -> None:
    grid = Grid(4, 8)
    weight = torch.zeros(2, 16)
    assert (dequantise(quantise(weight, nearest_scale(weight, grid), grid), nearest_scale(weight, grid)) == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16, 32])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_option_survives_compress_save_load_generate(
    tmp_path: Path, bits: int, group_size: int, head: bool, tied: bool
) -> None:
    parent, child = made(tmp_path, tied, bits=bits, group_size=group_size, head=head)
    assert child.manifest["grid"] == {"bits": bits, "group_size": group_size, "symmetric": True}
    names = quantised_names(child.tensors())
    assert len(names) == 2 * 7 + head
    assert ("lm_head" in names) is head
    assert child.config["tie_word_embeddings"] is (tied and not head)
    assert child.config["quantization_config"]["ignore"] == ([] if head else ["lm_head"])
    before, after = load_network(parent), load_network(child)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)  # never quantised
    assert torch.equal(before.model.norm.weight, after.model.norm.weight)
    weight = before.state_dict()["model.layers.1.mlp.down_proj.weight"]
    error = (after.state_dict()["model.layers.1.mlp.down_proj.weight"] - weight).abs().max()
    assert 0 < error <= weight.abs().max() / (2 ** (bits - 1) - 1)
    tokens = list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))
    assert len(tokens) == 3


def test_eight_bits_cost_a_quarter_and_four_an_eighth_of_the_matrices(tmp_path: Path) -> None:
    bytes_of = {}
    for bits in (8, 4):
        _, child = made(tmp_path / str(bits), tied=False, bits=bits, group_size=0)
        packed = {name: value for name, value in child.tensors().items() if name.endswith("weight_packed")}
        bytes_of[bits] = sum(value.numel() * value.element_size() for value in packed.values())
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 100 * 32
    assert bytes_of == {8: matrices, 4: matrices // 2}


def test_a_tied_head_is_quantised_apart_from_the_embedding_it_came_from(tmp_path: Path) -> None:
    parent, child = made(tmp_path, bits=8, group_size=32)
    embedding = parent.tensors()["model.embed_tokens.weight"]
    q, scale = integers(child.tensors(), "lm_head", Grid(8, 32))
    expected = quantise(embedding, nearest_scale(embedding, Grid(8, 32)), Grid(8, 32))
    assert torch.equal(q, expected)
    assert scale.shape == (100, 1)


@pytest.mark.parametrize("how", Scale)
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_found_as_asked_and_come_back_from_disk(tmp_path: Path, how: Scale, bits: int) -> None:
    parent, child = made(tmp_path, bits=bits, scale=how)
    grid, lost = Grid(bits, 32), {}
    for name in quantised_names(child.tensors()):
        weight = load_network(parent).state_dict()[f"{name}.weight"]
        q, scale = integers(child.tensors(), name, grid)
        assert torch.equal(scale, chosen_scale(weight, grid, how))
        assert torch.equal(q, quantise(weight, scale, grid))
        nearest = nearest_scale(weight, grid)
        lost[name] = [
            (dequantise(*kept) - weight).square().mean()
            for kept in ((q, scale), (quantise(weight, nearest, grid), nearest))
        ]
        assert bool((scale < 0).any()) is (how is Scale.signed) or bits == 8  # whose ends are all but equal
    ours, theirs = (sum(float(pair[at]) for pair in lost.values()) for at in (0, 1))
    assert ours == theirs if how is Scale.nearest else ours < 0.95 * theirs
    assert child.manifest["options"]["scale"] == how.name
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


def test_the_parent_is_not_changed(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    before = parent.hash
    make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    assert Variant(parent.path).hash == before
    assert "quantization_config" not in Variant(parent.path).config


def test_a_quantised_parent_is_refused(tmp_path: Path) -> None:
    _, child = made(tmp_path)
    with pytest.raises(UserError, match=r"rtn needs a float parent, got .* which is already quantised"):
        Rtn().compress(child, None, 0)


def test_a_group_size_that_does_not_divide_a_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="group_size must divide every matrix's input width, got 24 for"):
        made(tmp_path, group_size=24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, r"compression\.bits must be one of \[4, 8\], got 5"),
        ({"group_size": -1}, r"compression\.group_size must be 0 .whole row. or more, got -1"),
        ({"symmetric": False}, r"compression\.symmetric must be true, got False"),
    ],
)
def test_rtn_refuses_options_no_engine_could_use(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Rtn(**options)


def test_linear_layers_are_projections_and_the_head() -> None:
    linear = {name for name in decoder(shape(tied_head=False)).state_dict() if is_linear(name)}
    modules = {
        f"{name}.weight" for name, part in decoder(shape(tied_head=False)).named_modules()
        if isinstance(part, torch.nn.Linear)
    }  # fmt: skip
    assert linear == modules


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_an_lstms_matrices_are_quantised_survive_and_generate(tmp_path: Path, bits: int, tied: bool) -> None:
    parent = write_variant(tmp_path / "baseline", lstm(lstm_shape(tied_head=tied), spread=0.2))
    child, _ = make_variant(Rtn(bits=bits, group_size=16), parent, None, name="q", target=tmp_path / "q", seed=0)
    names = quantised_names(child.tensors())
    coders = [f"model.{coder}.layers.{layer}" for coder in ("encoder", "decoder") for layer in (0, 1)]
    assert set(names) == {"lm_head", *(f"{name}.{kind}_proj" for name in coders for kind in ("input", "hidden"))}
    assert child.config["tie_word_embeddings"] is False
    before, after = load_network(parent).eval(), load_network(child).eval()
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)  # never quantised
    grid, name = Grid(bits, 16), "model.encoder.layers.1.hidden_proj"
    weight = before.state_dict()[f"{name}.weight"]
    expected = dequantise(quantise(weight, nearest_scale(weight, grid), grid), nearest_scale(weight, grid))
    assert torch.equal(after.state_dict()[f"{name}.weight"], expected)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        error = (after(ids) - before(ids)).abs().max() / before(ids).abs().max()
    assert error < (0.5 if bits == 4 else 0.05)
    session = Eager(threads=1).load(child, tmp_path)
    assert len(list(session.submit(Request(1, (5, 6, 7), 8)))) == 8
