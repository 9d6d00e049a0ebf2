"""What this engine asks of the `openvino` package: to be imported without a word to anybody, and to compile a graph."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hasten.engine.base import Dtype

if TYPE_CHECKING:
    from hasten.artifacts import Json
    from hasten.engine.openvino import Openvino
    from hasten.model.grid import Grid, Grids

PRECISIONS = {Dtype.float32: "f32", Dtype.bfloat16: "bf16", Dtype.float16: "f16", Dtype.int8: "u8"}


def runtime() -> Any:
    """The `openvino` module.

    Importing it reports to its maker, and no variable stops that; where the package that sends is missing, it does not.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def properties(engine: Openvino, grid: Grid | Grids | None) -> Json:
    """How the plugin is told what the options say; nothing that changes answers is left to its defaults."""
    return {
        "INFERENCE_NUM_THREADS": engine.thread_count,
        "ENABLE_HYPER_THREADING": True,
        "ENABLE_CPU_PINNING": False,  # which cores are used is decided outside, for all engines alike
        "INFERENCE_PRECISION_HINT": PRECISIONS[engine.activations(grid)],
        "KV_CACHE_PRECISION": PRECISIONS[engine.kv_cache(grid)],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": engine.rounded(grid),
    }


def kernels(compiled: Any) -> str:
    """What multiplies, as the plugin compiled it: the weights' type and the kernel, `i4 (brgemm_avx512_f32)`."""
    found: dict[str, set[str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = {name: value.astype(str) for name, value in node.get_rt_info().items() if name != "execTimeMcs"}
        if facts["layerType"] == "FullyConnected":
            found.setdefault(facts["runtimePrecision"], set()).add(facts["primitiveType"])
    return ", ".join(f"{kind} ({' and '.join(sorted(types))})" for kind, types in sorted(found.items()))


def cache_for(port: Any, blocks: int) -> Any:
    """Zeros for so many blocks of what an input of the compiled graph wants."""
    openvino = runtime()
    shape = [blocks, *(dimension.get_length() for dimension in list(port.get_partial_shape())[1:])]
    tensor = openvino.Tensor(port.get_element_type(), openvino.Shape(shape))
    tensor.data[...] = 0
    return tensor
