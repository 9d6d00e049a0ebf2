from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.layerwise import walk
from hasten.compression.shared.scaling import Smoothing
from hasten.compression.smoothquant import Smoothquant
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.grid import Grid, dequantise, integers, quantised_names
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_variant

TEXT = text(12, 16, documents=2, padding=3)
SHAPES = {"llama": shape(tied_head=False), "tied": shape(), "gemma": shape(layers=3, **GEMMA)}


def salient(family: str = "llama") -> Decoder:
    """A few inputs of every block are much larger than the others."""
    model = decoder(SHAPES[family])
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[::9] += 30
    return model


def made(tmp_path: Path, family: str = "llama", **options: Any) -> tuple[Variant, Variant]:
    """A baseline and its quantised child."""
    parent = write_variant(tmp_path / "baseline", salient(family))
    method = Smoothquant(**{"group_size": 16, **options})
    return parent, make_variant(method, parent, TEXT, name="q", target=tmp_path / "q", seed=0)[0]


def first_inputs(model: Decoder) -> torch.Tensor:
    """Of the first block's queries, without padding."""
    x = model.model.layers[0].input_layernorm(model.model.embed(TEXT.ids))
    return x[TEXT.documents >= 0].detach()


def columns(model: Decoder) -> torch.Tensor:
    attention = model.model.layers[0].self_attn
    return torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_papers_scale_is_divided_out_of_the_norm_and_changes_no_logit(family: str, alpha: float) -> None:
    model = salient(family)
    x, w = first_inputs(model), columns(model)
    s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    with torch.no_grad():
        logits = model(TEXT.ids)
        walk(model, TEXT, Smoothing(alpha))
        torch.testing.assert_close(model(TEXT.ids), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first_inputs(model), x / s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(columns(model), w * s, rtol=1e-4, atol=1e-5)
    if alpha == 0.5:  # both sides are then equally uneven
        sizes = (first_inputs(model).abs().amax(0), columns(model).abs().amax(0))
        torch.testing.assert_close(*sizes, rtol=1e-4, atol=1e-5)


def test_inputs_and_matrices_both_in_integers_lose_less_than_by_rounding_alone(tmp_path: Path) -> None:
    parent, child = made(tmp_path, group_size=0)
    whole = load_network(parent)
    assert isinstance(whole, Decoder)
    right = first_inputs(whole) @ columns(whole).T

    def off(variant: Variant) -> float:
        """Per-token 8-bit inputs times the stored integers."""
        model = load_network(variant)
        assert isinstance(model, Decoder)
        x = first_inputs(model)
        step = x.abs().amax(1, keepdim=True) / 127
        return float(((x / step).round() * step @ columns(model).T - right).norm())

    plain, _ = make_variant(Rtn(group_size=0), parent, None, name="r", target=tmp_path / "r", seed=0)
    assert off(child) < 0.7 * off(plain)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_every_option_survives_compress_save_load_generate(tmp_path: Path, family: str, bits: int, head: bool) -> None:
    parent, child = made(tmp_path, family, bits=bits, head=head, alpha=0.3)
    assert child.manifest["grid"] == {"bits": bits, "group_size": 16, "symmetric": True}
    assert len(quantised_names(child.tensors())) == SHAPES[family].layers * 7 + head
    before, after = load_network(parent), load_network(child)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)  # never quantised
    assert torch.equal(before.lm_head.weight, after.lm_head.weight) is not head
    down = "model.layers.0.mlp.down_proj"  # no norm before it: rounded as it was
    rounded = Rtn(bits=bits, group_size=16).compress(parent, None, 0).tensors
    expected = dequantise(*integers(rounded, down, Grid(bits, 16)))
    assert torch.equal(after.state_dict()[f"{down}.weight"], expected)
    if bits == 8:
        with torch.no_grad():
            assert (after(TEXT.ids) - before(TEXT.ids)).norm() < 0.2 * before(TEXT.ids).norm()
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


def test_the_same_text_makes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (made(tmp_path / name)[1] for name in ("a", "b"))
    assert first.hash == second.hash


def test_smoothquant_needs_text_and_a_float_decoder(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    with pytest.raises(UserError, match=r"^smoothquant needs calibration text, got none$"):
        Smoothquant().compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match=r"smoothquant needs a float parent, got .* which is quantised; quantise last"):
        Smoothquant().compress(quantised, TEXT, 0)
    with pytest.raises(UserError, match=r"smoothquant is for decoders \(llama, .*\), got model_type 'hasten_lstm'"):
        Smoothquant().compress(write_variant(tmp_path / "lstm", lstm()), TEXT, 0)
    for alpha in (-0.1, 1.1):
        with pytest.raises(UserError, match=rf"compression\.alpha must be 0 to 1, got {alpha}"):
            Smoothquant(alpha=alpha)
