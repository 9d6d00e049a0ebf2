"""llama.cpp's own four bits, the baseline that a variant has to beat."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hasten.engine.base import Dtype, Request
from hasten.engine.gguf_layout import Entry
from hasten.errors import UserError
from hasten.model.grid import Grid
from tests.engine import llama
from tests.engine.llama import ids, prompt

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
from hasten.engine.llamacpp import Llamacpp  # noqa: E402
from hasten.engine.llamacpp.conversion import Conversion, Converter, rounded  # noqa: E402

ERRORS = {"Q4_0": 0.12, "Q4_K": 0.08, "Q5_0": 0.06, "Q6_K": 0.025, "Q8_0": 0.008}
"""At most, of normal weights' magnitude: what is lost by rounding."""


def weights(rows: int = 24, columns: int = 512) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_the_wheel_rounds_as_the_gguf_package_does(kind: str) -> None:
    theirs = gguf.quants.quantize(weights(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(rounded(weights(), kind), theirs)


@pytest.mark.parametrize("kind", ERRORS)
def test_what_is_rounded_reads_as_nearly_the_same(kind: str) -> None:
    again = gguf.quants.dequantize(rounded(weights(), kind), gguf.GGMLQuantizationType[kind])
    lost = np.sqrt(np.square(again - weights()).mean())
    assert ERRORS[kind] / 3 < lost < ERRORS[kind]


@pytest.mark.parametrize(
    ("conversion", "tied", "name", "columns", "kind"),
    [
        ("Q4_K_M", True, "token_embd", 512, "Q6_K"),
        ("Q4_K_M", False, "token_embd", 512, "Q4_K"),
        ("Q4_K_M", False, "output", 512, "Q6_K"),
        ("Q4_K_M", True, "blk.0.attn_v", 512, "Q6_K"),
        ("Q4_K_M", True, "blk.2.attn_v", 512, "Q4_K"),
        ("Q4_K_M", True, "blk.4.ffn_down", 512, "Q6_K"),  # (4 - 16 // 8) % 3 == 2
        ("Q4_K_M", True, "blk.14.ffn_down", 512, "Q6_K"),
        ("Q4_K_M", True, "blk.14.ffn_up", 512, "Q4_K"),
        ("Q4_K_M", True, "blk.14.ffn_up", 640, "Q5_0"),
        ("Q4_K_M", True, "blk.14.ffn_down", 640, "Q8_0"),
        ("Q4_K_M", True, "blk.14.ffn_down", 650, "F16"),
        ("Q4_0", True, "blk.14.ffn_down", 640, "Q4_0"),
        ("Q4_0", True, "token_embd", 640, "Q8_0"),
        ("Q4_0", False, "token_embd", 640, "Q4_0"),
    ],
)
def test_every_matrix_has_the_type_that_llama_cpp_gives_it(
    conversion: str, tied: bool, name: str, columns: int, kind: str
) -> None:
    converter = Converter({}, None, Dtype.float16, Conversion[conversion], layers=16, tied=tied)
    assert converter.kind(Entry("", name, (64, columns))) == kind
    assert converter.kind(Entry("", name, (columns,))) == "F32"


@pytest.mark.parametrize("conversion", [Conversion.Q4_0, Conversion.Q4_K_M])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_converted_model_answers_and_says_what_it_is(tmp_path: Path, conversion: Conversion, family: str) -> None:
    shape = llama.shape(hidden_size=256, feed_forward_size=256) if family == "llama" else llama.CASES[family]
    variant = llama.variant(tmp_path / "v", shape)
    engine = Llamacpp(threads=1, conversion=conversion, max_context=64)
    assert engine.supports(variant).native_format == conversion.value
    with closing(engine.load(variant, tmp_path)) as session:
        assert session.kernel.startswith(f"{conversion.value} (")
        assert session.arithmetic == "int8"
        assert len(ids(session.submit(Request(0, prompt(9), 8)))) == 8
        converted = session.weight_bytes_per_token
    with closing(Llamacpp(threads=1, weight_dtype=Dtype.float16, max_context=64).load(variant, tmp_path)) as session:
        assert session.weight_bytes_per_token > 1.5 * converted  # and another file, though of the same variant
    assert engine.describe()["conversion"] == conversion.value
    assert engine.converts and not Llamacpp().converts


def test_what_lies_on_a_grid_is_not_rounded_again(tmp_path: Path) -> None:
    grid = Grid(4, 32)
    variant = llama.variant(
        tmp_path / "v", llama.shape(), llama.quantised(llama.random_tensors(llama.shape()), grid), grid
    )
    engine = Llamacpp(conversion=Conversion.Q4_K_M)
    assert engine.supports(variant).reason == "engine.conversion=Q4_K_M rounds floats, this lies on a grid"
    with pytest.raises(UserError, match="rounds floats"):
        engine.load(variant, tmp_path)


def test_converted_weights_meet_activations_of_llama_cpps_choice(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    support = Llamacpp(conversion=Conversion.Q4_0, activation_dtype=Dtype.float32).supports(variant)
    assert "activation_dtype must be auto, got float32" in str(support.reason)
