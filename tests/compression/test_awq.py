from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.awq import Awq
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.layerwise import groups, walk
from hasten.compression.shared.quantiser import Scale, chosen_scale
from hasten.compression.shared.rounding import output_error
from hasten.compression.shared.scaling import Clipping, Protecting
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.grid import Grid, dequantise, integers, quantised_names
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_checkpoint, write_variant

TEXT = text(12, 16, documents=2, padding=3)
SHAPES = {
    "llama": shape(tied_head=False),
    "tied": shape(kv_heads=4, qkv_bias=True),
    "gemma": shape(layers=3, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"], **GEMMA),
}
GRID = Grid(4, 16)


def salient(family: str = "llama") -> Decoder:
    """A few inputs of every block are much larger than the others."""
    model = decoder(SHAPES[family])
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[::9] += 8
    return model


def made(tmp_path: Path, family: str = "llama", **options: Any) -> tuple[Variant, Variant]:
    """A baseline and its quantised child."""
    parent = write_variant(tmp_path / "baseline", salient(family))
    method = Awq(**{"group_size": 16, **options})
    return parent, make_variant(method, parent, TEXT, name="q", target=tmp_path / "q", seed=0)[0]


def inputs(model: Decoder) -> dict[str, torch.Tensor]:
    """What each matrix is given, without padding, float64."""
    found: dict[str, torch.Tensor] = {}
    real = TEXT.documents >= 0
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0][real].double()}))
        for group in groups(model, head=True)
        for name, linear in zip(group.names, group.linears, strict=True)
    ]
    with torch.no_grad():
        model.lm_head(model.hidden(TEXT.ids, documents=TEXT.documents))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_scaling_alone_changes_no_logit(family: str) -> None:
    model = salient(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(TEXT.ids)
        work = Protecting(GRID, 20)
        walk(model, TEXT, work)
        torch.testing.assert_close(model(TEXT.ids), logits, rtol=1e-4, atol=1e-4)
    assert max(work.powers.values()) > 0
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_power_is_the_one_that_serves_the_outputs_best() -> None:
    model = salient()
    x, weights = inputs(model), {name: value.clone() for name, value in model.state_dict().items()}
    work = Protecting(GRID, 5)
    walk(model, TEXT, work)
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    errors = {}
    for power in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        s = x[names[0]].abs().mean(0) ** power
        s = (s / (s.max() * s.min()).sqrt()).float()
        errors[power] = 0.0
        for name in names:
            scaled = weights[f"{name}.weight"] * s
            step = scaled.view(len(scaled), -1, 16).abs().amax(-1) / 7.5
            step = step.bfloat16().half().float().repeat_interleave(16, 1)
            kept = (scaled / step).round().clamp(-8, 7) * step / s
            errors[power] += float((x[name] @ (kept - weights[f"{name}.weight"]).double().T).square().sum())
    best = min(errors, key=lambda power: errors[power])
    assert best > 0
    assert work.powers[names[0]] == best
    assert errors[best] < 0.9 * errors[0.0]


@pytest.mark.parametrize("how", Scale)
@pytest.mark.parametrize("family", SHAPES)
def test_the_outputs_of_the_first_matrices_are_closer_than_those_of_rounding(
    tmp_path: Path, family: str, how: Scale
) -> None:
    parent, child = made(tmp_path, family, scale=how)
    rounded = Rtn(bits=4, group_size=16).compress(parent, None, 0).tensors
    model = load_network(parent).eval()
    assert isinstance(model, Decoder)
    x, whole = inputs(model), model.state_dict()
    ours = theirs = 0.0
    for part in "qk":  # nothing before them was rounded: both see the same inputs (values may have taken a scale)
        name = f"model.layers.0.self_attn.{part}_proj"
        gram, weight = x[name].T @ x[name], whole[f"{name}.weight"]
        theirs += output_error(dequantise(*integers(rounded, name, GRID)) - weight, gram)
        error = child.manifest["notes"]["errors"][name]
        ours += error * output_error(weight, gram)
    assert ours < 0.9 * theirs


def test_clipping_serves_each_groups_outputs_and_spares_queries_and_keys(tmp_path: Path) -> None:
    model = salient()
    seen, weights = inputs(model)["model.layers.0.self_attn.v_proj"], salient().state_dict()
    work = Clipping(GRID, Scale.search, plain=("q_proj", "k_proj", "lm_head"))
    walk(model, TEXT, work, head=True)
    for part, how in (("q", Scale.nearest), ("k", Scale.nearest), ("v", Scale.search)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        expected = chosen_scale(weights[name], GRID, how, seen.T @ seen)
        assert (work.integers[name][1] == expected).float().mean() > 0.98  # float32 sums decide ties otherwise
    head = chosen_scale(weights["lm_head.weight"], GRID, Scale.nearest)
    assert torch.equal(work.integers["lm_head.weight"][1], head)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", SHAPES)
def test_every_option_survives_compress_save_load_generate(
    tmp_path: Path, family: str, bits: int, group_size: int, head: bool
) -> None:
    parent, child = made(tmp_path, family, bits=bits, group_size=group_size, head=head, powers=3)
    assert child.manifest["grid"] == {"bits": bits, "group_size": group_size, "symmetric": True}
    assert len(quantised_names(child.tensors())) == SHAPES[family].layers * 7 + head
    before, after = load_network(parent), load_network(child)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)  # never quantised
    assert torch.equal(before.lm_head.weight, after.lm_head.weight) is not head
    if bits == 8:
        with torch.no_grad():
            off = (after(TEXT.ids) - before(TEXT.ids)).norm() / before(TEXT.ids).norm()
        assert off < 0.2
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


def test_scaled_norms_are_float32_and_everything_else_keeps_the_parents_types(tmp_path: Path) -> None:
    model = salient()
    tensors = {name: value.bfloat16() for name, value in write_checkpoint(tmp_path / "a", model).tensors().items()}
    parent = write_checkpoint(tmp_path / "b", model, tensors=tensors)
    made = Awq(group_size=16, head=False).compress(parent, TEXT, 0)
    kinds = {name: value.dtype for name, value in made.tensors.items() if not name.endswith(("packed", "shape"))}
    assert kinds["model.layers.0.input_layernorm.weight"] is torch.float32
    assert kinds["model.norm.weight"] is kinds["model.embed_tokens.weight"] is kinds["lm_head.weight"] is torch.bfloat16


def test_the_same_text_makes_the_same_bytes_and_padding_is_not_looked_at(tmp_path: Path) -> None:
    first, second = (made(tmp_path / name)[1] for name in ("a", "b"))
    assert first.hash == second.hash
    assert first.manifest["options"]["scale"] == "search"
    assert first.manifest["notes"]["powers"].keys() == {
        f"model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    other = text(12, 16, documents=2, padding=3)
    other.ids[other.documents < 0] = 77
    again = Awq(group_size=16).compress(Variant(tmp_path / "a/baseline"), other, 0).tensors
    assert all(torch.equal(value, again[name]) for name, value in first.tensors().items())


def test_awq_needs_text_and_a_float_decoder(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    with pytest.raises(UserError, match=r"^awq needs calibration text, got none$"):
        Awq().compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match=r"awq needs a float parent, got .* which is quantised; quantise last"):
        Awq().compress(quantised, TEXT, 0)
    with pytest.raises(UserError, match=r"awq is for decoders \(llama, .*\), got model_type 'hasten_lstm'"):
        Awq().compress(write_variant(tmp_path / "lstm", lstm()), TEXT, 0)
    with pytest.raises(UserError, match=r"compression\.powers must be at least 1, got 0"):
        Awq(powers=0)
