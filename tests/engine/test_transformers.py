"""What only the engine `transformers` has; the rest is in `test_conformance`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Dtype, Request
from hasten.engine.transformers import Transformers
from hasten.errors import UserError
from hasten.model.cost import cost_of
from tests.engine import llama

EXACT: dict[str, Any] = {"threads": 2, "weight_dtype": Dtype.float32, "max_context": 256}
PROMPT = tuple(range(5, 25))


@pytest.mark.parametrize("weights", [Dtype.auto, Dtype.float32])
def test_it_costs_the_bytes_it_says(tmp_path: Path, weights: Dtype) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    cost, size = cost_of(llama.shape()), 4 if weights is Dtype.float32 else 2
    with closing(Transformers(**{**EXACT, "weight_dtype": weights}).load(variant, tmp_path)) as session:
        assert len(list(session.submit(Request(0, PROMPT, 5)))) == 5
        assert session.kernel == session.arithmetic == ("float32" if size == 4 else "bfloat16")
        assert session.memory()["weights"] == cost.parameters * size
        assert session.weight_bytes_per_token == cost.parameters_per_token * size
        assert session.kv_bytes_per_position == cost.kv_bytes(1, size)


def test_integers_are_dequantised_and_labelled_so(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    quantised, _ = make_variant(Rtn(bits=8), variant, None, name="int8", target=tmp_path / "int8", seed=0)
    support = Transformers(weight_dtype=Dtype.auto).supports(quantised)
    assert (support.native, support.native_format) == (False, "bfloat16 (dequantised)")


def test_a_verified_request_fails_where_its_logits_do(tmp_path: Path) -> None:
    tensors = llama.random_tensors(llama.shape())
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    variant = llama.variant(tmp_path / "v", llama.shape(), tensors)
    words = "request 3: the logits are not finite after 0 tokens"
    with closing(Transformers(**EXACT).load(variant, tmp_path)) as session, pytest.raises(RuntimeError, match=words):
        list(session.submit(Request(3, PROMPT, 5, verify=True)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["tpu"]}, r"engine.devices must be one of \[cpu\], \[cuda:0\], got \['tpu'\]"),
        ({"activation_dtype": Dtype.bfloat16}, "engine.activation_dtype must be auto or float32 .* got bfloat16"),
        ({"kv_cache_dtype": Dtype.float16}, "engine.kv_cache_dtype must be auto or float32 .* got float16"),
    ],
)
def test_options_that_it_cannot_honour_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Transformers(**options)


@pytest.mark.slow
def test_compiled_it_answers_the_same(tmp_path: Path) -> None:
    """Half a minute of compiling, which is not counted as loading."""
    variant = llama.variant(tmp_path / "v", llama.shape())
    answers = []
    for compiled in (False, True):
        with closing(Transformers(**EXACT, compile=compiled).load(variant, tmp_path)) as session:
            answers.append([token.id for token in session.submit(Request(0, PROMPT, 24))])
            assert (session.compile_seconds > 1) == compiled
            assert session.kernel == ("float32, compiled" if compiled else "float32")
    torch._dynamo.reset()
    assert answers[0] == answers[1]
