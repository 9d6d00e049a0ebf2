"""Every engine as tests run it: the options under which it rounds nothing, and in what it is not like the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hasten.artifacts import Variant
from hasten.engine.base import Dtype, Engine, Session
from hasten.engine.compiled import Compiled
from hasten.engine.eager import Eager
from hasten.engine.llamacpp import Llamacpp
from hasten.engine.native import Native
from hasten.engine.native import build as kernels
from hasten.engine.onnxruntime import Onnxruntime
from hasten.engine.openvino import Openvino
from hasten.engine.transformers import Transformers
from hasten.engine.vllm import Vllm
from hasten.engine.vllm.build import installed

EXACT: dict[str, Any] = {"weight_dtype": Dtype.float32, "kv_cache_dtype": Dtype.float32, "max_context": 256}
FLOAT: dict[str, Any] = {"activation_dtype": Dtype.float32}
VLLM: dict[str, Any] = {"gpu_memory_utilization": 0.2, "capture": False}
if (installed() or ("cpu",))[0] == "cpu":
    VLLM["devices"] = ["cpu"]
NEAR_TIE = 0.002  # two logits closer than this may change places: sums are in another order


@dataclass(frozen=True)
class Tested:
    """An engine. options: beside EXACT, those under which its answers are the network's. needs: a package.

    integers: how the kernel for so many bits is called. family: the network that the shared suite runs.
    """

    kind: Callable[..., Engine]
    options: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    integers: str = "int{bits}"
    family: str = "llama"


ENGINES = {
    "compiled": Tested(Compiled, {**FLOAT, "compile": False}),  # test_compiled_conformance: compiled, in its formats
    "eager": Tested(Eager),
    "llamacpp": Tested(Llamacpp, needs="xllamacpp"),
    "native": Tested(Native, FLOAT),
    "native with a draft": Tested(Native, {**FLOAT, "draft": "draft", "guesses": 3}),
    "onnxruntime": Tested(Onnxruntime, FLOAT, "onnxruntime"),
    "openvino": Tested(Openvino, FLOAT, "openvino", "i{bits} ("),
    "transformers": Tested(Transformers),
    "vllm": Tested(Vllm, VLLM, "vllm", family="llama-llama3"),  # heads of 32: on CPUs it has no narrower ones
}
BATCHING = [name for name, one in ENGINES.items() if one.kind.batches]  # type: ignore[attr-defined]
OWN = ("native", "onnxruntime", "openvino")
"""Those whose every family and grid is held against our network here; others have tests of their own for that."""


def engine(name: str, **options: Any) -> Engine:
    """Skips the test where it is not installed."""
    tested = ENGINES[name]
    if tested.needs and importlib.util.find_spec(tested.needs) is None:
        pytest.skip(f"{tested.needs} is not installed")
    if tested.kind is Native and kernels.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return tested.kind(**{"threads": 1, **EXACT, **tested.options, **options})


def opened(name: str, variant: Variant, cache: Path, **options: Any) -> closing[Session]:
    """A session that is closed behind a `with`."""
    one = engine(name, **options)
    assert one.supports(variant), one.supports(variant).reason
    return closing(one.load(variant, cache))
