from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.gptq import Gptq
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared import rounding
from hasten.compression.shared.layerwise import groups
from hasten.compression.shared.quantiser import Scale, chosen_scale, nearest_scale
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model import grid as grids
from hasten.model.grid import Grid, dequantise, integers, quantise, quantised_names
from hasten.model.huggingface import load_network
from tests.compression.shared.test_compensation import column_by_column
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_variant

TEXT = text(12, 16, documents=2, padding=3)
SHAPES = {
    "llama": shape(tied_head=False),
    "tied": shape(),
    "gemma": shape(layers=3, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"], **GEMMA),
}


def made(tmp_path: Path, family: str = "llama", **options: Any) -> tuple[Variant, Variant]:
    """A baseline and its quantised child."""
    parent = write_variant(tmp_path / "baseline", decoder(SHAPES[family]))
    method = Gptq(**{"group_size": 16, **options})
    return parent, make_variant(method, parent, TEXT, name="q", target=tmp_path / "q", seed=0)[0]


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("act_order", [True, False])
def test_every_matrix_is_what_the_papers_algorithm_makes_of_what_it_is_given(
    tmp_path: Path, family: str, act_order: bool
) -> None:
    parent, child = made(tmp_path, family, act_order=act_order)
    before, after, grid = load_network(parent).eval(), load_network(child).eval(), Grid(4, 16)
    weights, real = before.state_dict(), TEXT.documents >= 0
    inputs: dict[str, torch.Tensor] = {}
    for group in groups(after, head=True):  # what the rounded network gives each matrix in one ordinary pass
        for name, linear in zip(group.names, group.linears, strict=True):
            linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0][real].double()}))
    with torch.no_grad():
        after.lm_head(after.hidden(TEXT.ids, documents=TEXT.documents))
    for name, x in inputs.items():
        weight, gram = weights[f"{name}.weight"], x.T @ x
        q, scale = integers(child.tensors(), name, grid)
        assert torch.equal(scale, nearest_scale(weight, grid))
        order = gram.diagonal().argsort(descending=True).tolist() if act_order else list(range(len(gram)))
        expected = column_by_column(weight, scale, gram, order, 0.01, grid)
        rows = (q == expected).all(1).float().mean()
        assert rows > 0.9, name  # float32 sums decide ties otherwise, and with a tie what is left of its row
        lost, plain = (
            (x @ (weight - dequantise(values, scale)).T.double()).square().sum()
            for values in (q, quantise(weight, scale, grid))
        )
        assert lost < plain, name
        assert child.manifest["notes"]["errors"][name] == pytest.approx(
            float(lost / (x @ weight.T.double()).square().sum()), rel=1e-3, abs=1e-6
        )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_every_option_survives_compress_save_load_generate(
    tmp_path: Path, family: str, bits: int, group_size: int, head: bool
) -> None:
    parent, child = made(tmp_path, family, bits=bits, group_size=group_size, head=head)
    assert child.manifest["grid"] == {"bits": bits, "group_size": group_size, "symmetric": True}
    assert len(quantised_names(child.tensors())) == SHAPES[family].layers * 7 + head
    before, after = load_network(parent), load_network(child)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)  # never quantised
    assert torch.equal(before.model.norm.weight, after.model.norm.weight)
    assert torch.equal(before.lm_head.weight, after.lm_head.weight) is not head
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


@pytest.mark.parametrize("how", Scale)
def test_scales_are_fixed_before_anything_is_rounded(tmp_path: Path, how: Scale) -> None:
    parent, child = made(tmp_path, scale=how, group_size=8)
    name, seen = "model.layers.0.self_attn.q_proj", []
    model = load_network(parent).eval()
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][TEXT.documents >= 0]))
    with torch.no_grad():
        model.hidden(TEXT.ids, documents=TEXT.documents)
    expected = chosen_scale(model.get_submodule(name).weight, Grid(4, 8), how, seen[0].double().square().sum(0))
    assert torch.equal(integers(child.tensors(), name, Grid(4, 8))[1], expected)


def test_padding_is_not_looked_at(tmp_path: Path) -> None:
    parent, child = made(tmp_path)
    other = text(12, 16, documents=2, padding=3)
    other.ids[other.documents < 0] = 77
    again = Gptq(group_size=16).compress(parent, other, 0).tensors
    assert all(torch.equal(value, again[name]) for name, value in child.tensors().items())


def test_large_heads_are_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = made(tmp_path, scale=Scale.search)
    for module in (grids, rounding):
        monkeypatch.setattr(module, "ROWS", 7)
    again = Gptq(group_size=16, scale=Scale.search).compress(parent, TEXT, 0)
    assert all(torch.equal(value, again.tensors[name]) for name, value in child.tensors().items())
    assert again.notes == {**child.manifest["notes"], "errors": pytest.approx(child.manifest["notes"]["errors"])}


def test_damping_that_is_too_little_is_raised_and_noted(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline", decoder(SHAPES["llama"]))
    few = text(1, 8)  # 8 tokens for 32 inputs
    assert Gptq(damping=0.01).compress(parent, few, 0).notes["damping_raised"] == {}
    model = load_network(parent)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    raised = Gptq(damping=0.0).compress(write_variant(tmp_path / "b", model), few, 0).notes["damping_raised"]
    assert set(raised) <= {group.names[0] for group in groups(model, head=True)}
    assert raised
    assert min(raised.values()) >= 1e-6


def test_the_same_text_makes_the_same_bytes_and_other_text_others(tmp_path: Path) -> None:
    first, second = (made(tmp_path / name)[1] for name in ("a", "b"))
    assert first.hash == second.hash
    assert first.manifest["options"]["scale"] == "nearest"
    other, _ = make_variant(
        Gptq(group_size=16), Variant(tmp_path / "a/baseline"), text(seed=1), name="q", target=tmp_path / "c", seed=0
    )
    assert not torch.equal(other.tensors()["lm_head.weight_packed"], first.tensors()["lm_head.weight_packed"])


def test_gptq_needs_text_and_a_float_decoder(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    with pytest.raises(UserError, match=r"^gptq needs calibration text, got none$"):
        Gptq().compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match=r"gptq needs a float parent, got .* which is quantised; quantise last"):
        Gptq().compress(quantised, TEXT, 0)
    with pytest.raises(UserError, match=r"gptq is for decoders \(llama, .*\), got model_type 'hasten_lstm'"):
        Gptq().compress(write_variant(tmp_path / "lstm", lstm()), TEXT, 0)
    with pytest.raises(UserError, match="group_size must divide every matrix's input width, got 24 for"):
        Gptq(group_size=24).compress(parent, TEXT, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -0.1}, r"compression\.damping must be 0 to 1, got -0\.1"),
        ({"damping": 1.5}, r"compression\.damping must be 0 to 1, got 1\.5"),
        ({"bits": 3}, r"compression\.bits must be one of \[4, 8\], got 3"),
        ({"symmetric": False}, r"compression\.symmetric must be true, got False"),
    ],
)
def test_gptq_refuses_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Gptq(**options)
