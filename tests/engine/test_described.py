from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from hasten.config import discover
from hasten.engine.base import Dtype, Engine, Parallel
from hasten.engine.compiled import Compiled
from hasten.engine.described import engine_of
from hasten.engine.llamacpp import FlashAttention, Llamacpp
from hasten.engine.llamacpp.conversion import Conversion
from hasten.engine.native import Native
from hasten.engine.openvino import Openvino
from hasten.engine.vllm import Vllm

TWO: dict[str, Any] = {"devices": ["cuda:0", "cuda:1"], "parallel": Parallel.tensor}


@pytest.mark.parametrize(
    "engine",
    [
        *(kind() for kind in discover("engine").values()),
        Llamacpp(conversion=Conversion.Q4_K_M, slots=4, micro_batch=64, flash_attention=FlashAttention.disabled),
        Native(draft="shallow", guesses=3, kv_cache_dtype=Dtype.float32),
        Openvino(activation_group=64, max_context=100),
        Compiled(compile=False, chunks=[8]),
        Vllm(fp8_kv_cache=True, capture=False, gpu_memory_utilization=0.5, **TWO),
    ],
    ids=lambda engine: engine.name,
)
def test_what_a_record_says_is_enough_to_make_the_engine_again(engine: Engine) -> None:
    assert engine_of(engine.describe()).describe() == engine.describe()
    assert {field.name for field in fields(engine)} <= engine.describe().keys()  # no option is left unsaid


def test_threads_are_this_machines() -> None:
    assert engine_of(Native(threads=77).describe()).threads == 0
