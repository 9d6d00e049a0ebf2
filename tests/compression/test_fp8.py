from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Variant
from hasten.compression.embedding import Embedding
from hasten.compression.fp8 import INPUTS, Fp8, nearest_scale, rounded
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Dtype, Engine, Request
from hasten.engine.compiled import Compiled
from hasten.engine.eager import Eager
from hasten.engine.llamacpp import Llamacpp
from hasten.engine.native import Native
from hasten.engine.onnxruntime import Onnxruntime
from hasten.engine.openvino import Openvino
from hasten.engine.transformers import Transformers
from hasten.engine.vllm import Vllm, head_named, weight_bytes
from hasten.errors import UserError
from hasten.model.cost import cost_of
from hasten.model.grid import Grid, floats, grid_of, quantised_names, quantization_config
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.tiny import decoder, lstm, shape, write_variant

IDS, SHAPE = text().ids, shape(qkv_bias=True, heads=2, kv_heads=1)
MATRIX = "model.layers.1.mlp.down_proj"


def made(parent: Variant, name: str = "fp8", **options: Any) -> Variant:
    return make_variant(Fp8(**options), parent, None, name=name, target=parent.path.with_name(name), seed=0)[0]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return write_variant(tmp_path_factory.mktemp("fp8") / "baseline", decoder(SHAPE))


@pytest.fixture(scope="module")
def variant(parent: Variant) -> Variant:
    return made(parent)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    seed=st.integers(0, 9999),
    magnitude=st.sampled_from([1e-4, 1.0, 300.0]),
    share=st.sampled_from([0.5, 1.0]),
)
def test_rounding_and_widening_equal_compressed_tensors(
    rows: int, columns: int, seed: int, magnitude: float, share: float
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    scale = nearest_scale(weight) * share  # by half: the largest are clipped
    ours = rounded(weight, scale)
    found = quantization_config(Grid(8, 0, type="float"), [])
    found["config_groups"]["group_0"]["input_activations"] = INPUTS
    scheme = QuantizationConfig.model_validate(found).config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry("float-quantized")
    packed = theirs.compress({"weight": weight, "weight_scale": scale}, scheme)["weight"]
    assert ours.dtype is packed.dtype is torch.float8_e4m3fn
    assert torch.equal(ours.float(), packed.float())
    stored = {"m.weight": ours, "m.weight_scale": scale}
    widened = theirs.decompress({"weight": ours, "weight_scale": scale}, scheme)["weight"]
    assert torch.equal(floats(stored, Grid(8, 0, type="float"))["m.weight"], widened.float())
    assert bool(rounded(torch.zeros(1, 3), nearest_scale(torch.zeros(1, 3))).float().eq(0).all())
    if share == 1:
        error = (widened.float() - weight).abs()
        assert bool((error <= weight.abs() / 16 + scale * 2.0**-10).all())  # half a step of the least number at most


def test_what_is_stored_is_what_compressed_tensors_calls_float_quantized(variant: Variant, parent: Variant) -> None:
    tensors, grid = variant.tensors(), grid_of(variant)
    assert variant.manifest["grid"] == {"bits": 8, "group_size": 0, "symmetric": True, "type": "float"}
    assert Grid(8, 0).describe() == {"bits": 8, "group_size": 0, "symmetric": True}  # integers' manifests stay
    assert set(quantised_names(tensors)) == {
        name.removesuffix("_scale").removesuffix(".weight") for name in tensors if name.endswith("_scale")
    }
    assert tensors[f"{MATRIX}.weight"].dtype is torch.float8_e4m3fn and tensors[f"{MATRIX}.weight_scale"].shape == (
        32,
        1,
    )
    assert tensors["lm_head.weight"].dtype is torch.float8_e4m3fn and not variant.config["tie_word_embeddings"]
    assert tensors["model.embed_tokens.weight"].dtype is torch.float32
    scale = tensors[f"{MATRIX}.weight_scale"]
    assert torch.equal(scale.bfloat16().float(), scale)
    before = parent.tensors()
    for name, value in floats(tensors, grid).items():
        if name in before:
            assert float((value - before[name]).abs().max()) <= 0.07 * float(before[name].abs().max())


@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_options_are_said_in_the_config(parent: Variant, activations: bool, head: bool) -> None:
    found = made(parent, f"a{activations}h{head}", activations=activations, head=head)
    config = found.config["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs or {}).get("strategy") == ("token" if activations else None)
    assert config["ignore"] == ([] if head else ["lm_head"])
    assert ("lm_head.weight" in found.tensors()) == head
    assert (head_named(found.config) != {}) == head


def test_it_opens_in_transformers_with_our_logits(variant: Variant) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(variant.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(load_network(variant).eval()(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_eager_and_transformers_widen_it_and_say_so(variant: Variant, tmp_path: Path) -> None:
    for engine in (Eager(threads=1), Transformers(threads=1, weight_dtype=Dtype.float32)):
        support = engine.supports(variant)
        assert (support.native, support.native_format) == (False, "float32 (dequantised)")
    assert len(list(Eager(threads=1).load(variant, tmp_path).submit(Request(0, (5, 6), 4)))) == 4


@pytest.mark.parametrize("engine", [Compiled, Llamacpp, Native, Onnxruntime, Openvino])
def test_no_processor_multiplies_it(variant: Variant, engine: type[Engine]) -> None:
    assert "no kernel here for float8 weights" in str(engine().reads(variant).reason)


def test_vllm_reads_it(variant: Variant) -> None:
    assert Vllm().reads(variant).native_format == "float8 per channel"
    assert "got float32" in str(Vllm(weight_dtype=Dtype.float32).reads(variant).reason)
    cost = cost_of(SHAPE)
    tensors = variant.tensors()
    expected = sum(
        value.nbytes if value.dtype is torch.float8_e4m3fn or name.endswith("_scale") else 2 * value.numel()
        for name, value in tensors.items()
        if name != "model.embed_tokens.weight"
    )
    assert weight_bytes(cost, grid_of(variant), 2) == expected + 2 * 32  # of the embedding a row


def test_an_lstm_has_such_weights_too(tmp_path: Path) -> None:
    found = made(write_variant(tmp_path / "baseline", lstm()))
    assert len(list(Eager(threads=1).load(found, tmp_path).submit(Request(0, (5, 6), 4)))) == 4


def test_what_cannot_be_is_refused(variant: Variant, parent: Variant) -> None:
    for method in (Fp8(), Rtn()):
        with pytest.raises(UserError, match=f"{method.name} needs a float parent"):
            method.compress(variant, None, 0)
    with pytest.raises(UserError, match=r"type must be one of \['int', 'float'\], got 'posit'"):
        Grid(8, 0, type="posit")
    for bits, group in ((4, 0), (8, 32)):
        with pytest.raises(UserError, match=f"type float has 8 bits and whole rows .* got {bits} and {group}"):
            Grid(bits, group, type="float")
    with pytest.raises(UserError, match=r"embedding needs a parent of integers, got .* which is 8-bit floats"):
        Embedding().compress(variant, None, 0)
    tensors, grid = variant.tensors(), Grid(8, 0, type="float")
    broken: list[dict[str, torch.Tensor]] = [
        {f"{MATRIX}.weight_scale": torch.ones(31, 1)},
        {f"{MATRIX}.weight_scale": torch.ones(32)},
    ]
    for change in broken:
        with pytest.raises(UserError, match=f"matrix {MATRIX} must be float8_e4m3fn with a scale for each row"):
            floats({**tensors, **change}, grid)
    with pytest.raises(UserError, match="its manifest declares no grid"):
        floats(tensors, None)
