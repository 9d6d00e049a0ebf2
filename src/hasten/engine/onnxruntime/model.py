"""A graph loaded into ONNX Runtime, and the keys and values of its sequences, which every pass extends in place.

Past and present are bound to the same memory, and whatever a pass reads or writes is bound once for each shape: a call
then costs some ten microseconds beside the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.engine.onnxruntime.runtime import runtime

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hasten.model.config import ModelConfig

    Array = np.ndarray[Any, np.dtype[Any]]


SPIN_MICROSECONDS = 5000
"""How long threads wait for work awake: beyond the choice of a token, far below the 35 ms of the library."""


@dataclass
class Pass:
    """What passes over some slots are bound to. ids (B, T), last and total as `GroupQueryAttention` counts tokens."""

    bound: Any
    ids: Array
    last: Array
    total: Array
    logits: Array


class Model:
    """Shapes: B sequences, S the longest context, K key/value heads, D head width."""

    def __init__(self, path: Path, config: ModelConfig, context: int, slots: int, threads: int) -> None:
        import numpy as np

        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
        options.enable_mem_pattern = False  # prompts have many lengths, and a pattern would be kept for each
        self._session: Any = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._value = ort.OrtValue.ortvalue_from_numpy  # it shares the array's memory
        self._vocabulary, self._angles = config.vocab_size, angles(config, context)
        names = [f"{part}.{layer}" for layer in range(config.layers) for part in ("key", "value")]
        shape = (slots, config.kv_heads, context, config.head_width)
        self._caches = {name: np.zeros(shape, np.float32) for name in names}
        self._passes: dict[tuple[int, int], Pass] = {}
        self.logits([(0,)], [0])

    def logits(self, ids: Sequence[Sequence[int]], past: Sequence[int], first: int = 0) -> Tensor:
        """What follows `ids`, rows of one length for the slots from `first` on: (B, vocabulary) float32.

        past: how many tokens came before, by row; more than one row takes one id each. The next call may overwrite it.
        """
        import numpy as np
        import torch

        rows, length = len(ids), len(ids[0])
        one = self._passes.get((first, rows)) or self._bind(first, rows)
        if one.ids.shape[1] != length:
            one.ids = np.zeros((rows, length), np.int64)
            one.bound.bind_ortvalue_input("ids", self._value(one.ids))
        one.ids[:], one.total[()] = ids, max(past) + length
        one.last[:] = [count + length - 1 for count in past]
        self._session.run_with_iobinding(one.bound)
        return torch.from_numpy(one.logits)

    def _bind(self, first: int, rows: int) -> Pass:
        import numpy as np

        one = Pass(self._session.io_binding(), np.zeros((rows, 0), np.int64), np.zeros(rows, np.int32),
                   np.zeros((), np.int32), np.zeros((rows, self._vocabulary), np.float32))  # fmt: skip
        for name, array in {"last": one.last, "total": one.total, **self._angles}.items():
            one.bound.bind_ortvalue_input(name, self._value(array))
        one.bound.bind_ortvalue_output("logits", self._value(one.logits))
        for name, array in self._caches.items():
            cache = self._value(array[first : first + rows])
            one.bound.bind_ortvalue_input(f"past_{name}", cache)
            one.bound.bind_ortvalue_output(f"present_{name}", cache)
        self._passes[first, rows] = one
        return one

    def move(self, source: int, target: int, tokens: int) -> None:
        """Give the first `tokens` of a slot to another one."""
        for cache in self._caches.values():
            cache[target, :, :tokens] = cache[source, :, :tokens]

    @property
    def closed(self) -> bool:
        return self._session is None

    def close(self) -> None:
        self._passes.clear()
        self._caches.clear()
        self._session = None


def angles(config: ModelConfig, context: int) -> dict[str, Array]:
    """cos and sin of the rotary angles as the graph takes them, (S, D / 2), also those of sliding layers."""
    import torch

    from hasten.model.config import RopeScaling
    from hasten.model.decoder import frequencies, rotary

    kinds = {"": (config.rope_theta, config.rope_scaling)}
    if config.sliding_layers and config.local_rope_theta:
        kinds["local_"] = (config.local_rope_theta, RopeScaling())
    found = {}
    for prefix, (theta, scaling) in kinds.items():
        tables = rotary(torch.arange(context), frequencies(config.head_width, theta, scaling))
        for name, table in zip(("cos", "sin"), tables, strict=True):
            found[f"{prefix}{name}"] = table[:, : config.head_width // 2].contiguous().numpy()
    return found
