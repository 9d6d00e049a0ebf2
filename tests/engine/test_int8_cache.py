"""Keys and values in 8 bits: in the engines that have them, each in its own layout, and refused by the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hasten.engine.base import Dtype, Engine, Request
from hasten.engine.formats import caches, engines
from hasten.engine.llamacpp import FlashAttention, Llamacpp
from hasten.engine.native import Native
from hasten.engine.native import build as kernels
from hasten.engine.openvino import Openvino, has_bfloat16
from hasten.errors import UserError
from hasten.model.huggingface import load_network
from tests.engine import llama
from tests.engine.llama import far_from_best, ids, prompt

HERE = {
    "llamacpp": importlib.util.find_spec("xllamacpp") is not None,
    "native": kernels.compiler() is not None,
    "openvino": importlib.util.find_spec("openvino") is not None,
}
INT8: dict[str, Any] = {"threads": 1, "max_context": 256, "slots": 2, "kv_cache_dtype": Dtype.int8}


@pytest.mark.parametrize(
    ("engine", "weights", "bytes_per_value"),
    [
        (Llamacpp, Dtype.float32, 34 / 32),  # a float16 scale for every 32
        (Native, Dtype.float32, (32 + 4) / 32),  # keys and values alike: a float32 scale
        (Openvino, Dtype.float32, (32 + 8) / 32),  # a float32 scale and zero
        pytest.param(
            Openvino, Dtype.bfloat16, (32 + 8) / 32, marks=pytest.mark.skipif(not has_bfloat16(), reason="no bfloat16")
        ),
    ],
)
def test_answers_are_close_and_every_byte_is_counted(
    tmp_path: Path, cache: Path, engine: Callable[..., Engine], weights: Dtype, bytes_per_value: float
) -> None:
    loading = engine(**INT8, weight_dtype=weights)
    if not HERE[loading.name]:
        pytest.skip(f"{loading.name} cannot run here")
    config = llama.shape(head_size=32)
    variant = llama.variant(tmp_path / "v", config)
    model = load_network(variant).eval()
    with closing(loading.load(variant, cache)) as session:
        assert session.kv_bytes_per_position == 2 * config.layers * config.kv_heads * 32 * bytes_per_value
        assert session.memory()["kv_cache"] == 2 * 256 * session.kv_bytes_per_position
        worst = [far_from_best(model, p, ids(session.submit(Request(0, p, 1)))) for p in map(prompt, range(20, 40))]
    assert sum(one == 0 for one in worst) >= 16
    assert max(worst) < 0.5
    assert loading.describe()["kv_cache_dtype"] == "int8"


def test_the_others_refuse_them_in_a_sentence() -> None:
    keeping = {name for name, engine in engines().items() if engine.int8_cache}
    assert keeping == HERE.keys()
    for name, engine in engines().items():
        if name not in keeping:
            with pytest.raises(UserError, match=f"kv_cache_dtype must be auto or a float for {name}, .*, got int8"):
                engine(kv_cache_dtype=Dtype.int8)


def test_the_table_has_them_where_the_engine_is() -> None:
    for name, kinds in caches().items():
        assert (Dtype.int8 in kinds) == HERE.get(name, False)


@pytest.mark.skipif(not HERE["llamacpp"], reason="xllamacpp is not installed")
def test_llamacpp_needs_wide_heads_and_fused_attention(tmp_path: Path) -> None:
    narrow = llama.variant(tmp_path / "v", llama.shape())
    assert "the heads' width must be a multiple of it, got 16" in str(Llamacpp(**INT8).supports(narrow).reason)
    with pytest.raises(UserError, match="flash_attention must be auto or enabled for an int8 KV cache, got disabled"):
        Llamacpp(kv_cache_dtype=Dtype.int8, flash_attention=FlashAttention.disabled)


@pytest.mark.parametrize("option", ["weight_dtype", "activation_dtype"])
def test_no_engine_makes_weights_or_activations_integers(option: str) -> None:
    for engine in engines().values():
        with pytest.raises(UserError, match=f"engine.{option} must be auto or a float, .*, got int8"):
            engine(**{option: Dtype.int8})
