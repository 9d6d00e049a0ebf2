"""ONNX Runtime itself: told to report nothing, and asked by an experiment what it does not say."""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from hasten.config import QUIET
from hasten.errors import UserError

TELEMETRY = "ORT_DISABLE_TELEMETRY"
OLDEST = (1, 32)


def runtime() -> Any:
    """The library. Since 1.29 it reports to its makers on Linux too, unless it is told not to before it is imported.

    Raises `UserError` for an old one: in those a sliding window was one token longer.
    """
    os.environ.setdefault(TELEMETRY, QUIET[TELEMETRY])
    import onnxruntime

    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"onnxruntime must be at least {oldest}, got {onnxruntime.__version__}: pip install -U onnxruntime"
        )
    onnxruntime.set_default_logger_severity(3)  # errors: it warns of hardware that it does not know
    return onnxruntime


@lru_cache
def rounds_activations(bits: int) -> bool:
    """Whether MatMulNBits really multiplies integers on this processor: without kernels for it, it would silently
    dequantise, and an activation far below its block's largest would still count.
    """
    import numpy as np
    import torch
    from onnx import TensorProto

    from hasten.engine.onnxruntime.graph import INT8_ACTIVATIONS, Graph
    from hasten.model.grid import Grid, stored

    grid = Grid(bits, 32)
    ones = stored("w", torch.ones(1, 32, dtype=torch.int8), torch.ones(1, 1), grid)
    with tempfile.TemporaryDirectory() as name:
        graph = Graph(ones, grid, INT8_ACTIVATIONS, Path(name))
        y = graph.linear("x", "w")
        graph.save({"x": (TensorProto.FLOAT, [1, 32])}, {y: (TensorProto.FLOAT, [1, 1])})
        session = runtime().InferenceSession(Path(name, "model.onnx"), providers=["CPUExecutionProvider"])
        x = np.array([[127.0] + [0.25] * 31], np.float32)  # 127 * 1 + 31 * 0.25, or 127
        return bool(session.run(None, {"x": x})[0][0, 0] < 128)
