"""ONNX Runtime: a graph of fused operators, and integer kernels that come with one `pip install` on any processor.

A variant becomes an ONNX graph once (`hasten.engine.onnxruntime.graph`), its integers the blocks of MatMulNBits
(`blocks`), bit for bit. Those are multiplied as they lie: by default with activations that are rounded to 8 bits, a
scale for each block (`accuracy_level` 4), or with float32 activations (level 1), for comparing answers.

The loop over tokens is our own and needs `onnxruntime` alone: everything but the ids is bound once, past and present
keys are the same memory, so a token costs one call of some ten microseconds beside the arithmetic. A prompt is read
`micro_batch` tokens at a time. `onnxruntime-genai` would be a second wheel around that same call, with a search and a
tokenizer that we do not want. Requests run one after another: the attention kernel's batch has one length.

ONNX Runtime reports to its makers by default, which is switched off here before it is imported.

    python pipelines/evaluate.py engine=onnxruntime variant=int4
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant, read_json, write_json
from hasten.engine.base import Dtype, Engine, Request, Session, Support, built
from hasten.engine.onnxruntime.library import rounds_activations, runtime
from hasten.engine.sampling import probabilities
from hasten.engine.streaming import Flight, Stream
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.config import ModelConfig


@dataclass
class Onnxruntime(Engine):
    """Weights that a variant leaves in float and the KV cache are float32.

    activation_dtype: auto rounds to 8 bits before a product with integers; float32 rounds nothing, for comparing
    answers. micro_batch: prompt tokens computed at a time.
    """

    micro_batch: int = 512

    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices != ["cpu"]:
            raise UserError(f"engine.devices must be [cpu] for onnxruntime, got {self.devices}")
        for name in ("weight_dtype", "activation_dtype", "kv_cache_dtype"):
            if getattr(self, name) not in (Dtype.auto, Dtype.float32):
                raise UserError(
                    f"engine.{name} must be auto or float32 for onnxruntime, whose CPU kernels have no smaller floats, "
                    f"got {getattr(self, name).name}"
                )
        if not 1 <= self.micro_batch <= 4096:
            raise UserError(f"engine.micro_batch must be 1 to 4096, got {self.micro_batch}")

    def supports(self, variant: Variant) -> Support:
        from hasten.model.config import ModelConfig
        from hasten.model.shape import read_shape

        missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
        if missing:
            return Support(reason=f'{missing[0]} is not installed: pip install "hasten[onnxruntime]"')
        try:
            shape = read_shape(variant.config)
        except UserError as error:
            return Support(reason=str(error))
        if not isinstance(shape, ModelConfig):
            return Support(reason=f"the graph is a decoder's, got {variant.config.get('model_type')!r}")
        if shape.head_width % 16:
            return Support(reason=f"GroupQueryAttention turns heads of a multiple of 16 values, got {shape.head_width}")
        grid = variant.manifest.get("grid")
        if not grid:
            return Support(native_format="float32")
        return self._supports_grid(grid["bits"], grid["group_size"])

    def _supports_grid(self, bits: int, group_size: int) -> Support:
        from hasten.engine.onnxruntime.blocks import BLOCKS, block_size

        if group_size % BLOCKS[-1]:
            return Support(reason=f"MatMulNBits has a scale for {BLOCKS[-1]} to {BLOCKS[0]} weights: group_size must "
                           f"be 0 or a multiple of {BLOCKS[-1]}, got {group_size}")  # fmt: skip
        if bits == 8 and self.activation_dtype is Dtype.float32:
            return Support(native_format="float32 (dequantised in every pass)", native=False)
        block = f"block {block_size(group_size, group_size)}" if group_size else "per channel"
        return Support(native_format=f"int{bits} {block}")

    def arithmetic(self, variant: Variant) -> str:
        """What the multiplications use: `int8` where activations are rounded."""
        return "int8" if variant.manifest.get("grid") and self.activation_dtype is Dtype.auto else "float32"

    def build(self, variant: Variant, cache: Path) -> Path:
        """The folder that holds the graph, its weights and their facts; written once, then found again."""
        from hasten.engine.onnxruntime import graph
        from hasten.model.config_json import from_huggingface
        from hasten.model.huggingface import grid_of

        arithmetic = self.arithmetic(variant)
        level = graph.INT8_ACTIVATIONS if arithmetic == "int8" else graph.FLOAT_ACTIVATIONS

        def make(folder: Path) -> None:
            config = from_huggingface(variant.config)
            read = graph.write(config, variant.tensors(), grid_of(variant), level, folder)
            write_json(folder / "manifest.json", {"schema": 1, "kind": "onnx", "weight_bytes_per_token": read})

        return built(cache / "onnxruntime" / f"{variant.hash}-{arithmetic}-{graph.FORMAT}", make)

    def load(self, variant: Variant, cache: Path) -> OnnxruntimeSession:
        support = self.supports(variant)
        if not support:
            raise UserError(f"onnxruntime cannot run {variant.path.name}: {support.reason}")
        if self.arithmetic(variant) == "int8" and not rounds_activations(variant.manifest["grid"]["bits"]):
            raise UserError("onnxruntime has no integer kernels for this processor, it would dequantise in every pass")
        start = time.perf_counter()
        folder = self.build(variant, cache)
        ready = time.perf_counter()
        session = OnnxruntimeSession(self, folder, variant, str(support.native_format))
        session.compile_seconds, session.load_seconds = ready - start, time.perf_counter() - ready
        return session

    def describe(self) -> Json:
        types = dict.fromkeys(("weight_dtype", "kv_cache_dtype"), Dtype.float32.name)
        return {**super().describe(), **types, "micro_batch": self.micro_batch}


class OnnxruntimeSession(Session):
    """One request at a time, on a thread of its own; the KV cache is allocated once and overwritten by the next."""

    def __init__(self, engine: Onnxruntime, folder: Path, variant: Variant, native_format: str) -> None:
        from hasten.model.config_json import from_huggingface
        from hasten.model.cost import cost_of

        self.config = config = from_huggingface(variant.config)
        self.context, self.micro_batch = min(engine.max_context, config.context), engine.micro_batch
        self.kernel, self.arithmetic = native_format, engine.arithmetic(variant)
        self.weight_bytes_per_token = read_json(folder / "manifest.json")["weight_bytes_per_token"]
        self.kv_bytes_per_position = cost_of(config).kv_bytes(1, 4)
        self._weight_bytes = (folder / "weights.bin").stat().st_size
        self._open(folder / "model.onnx", engine.thread_count)
        self._flights: set[Flight] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")

    def _open(self, path: Path, threads: int) -> None:
        import numpy as np

        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False  # prompts have many lengths, and a pattern is kept for each
        self._session: Any = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._bound: Any = self._session.io_binding()
        self._value = ort.OrtValue.ortvalue_from_numpy  # shares the array's memory
        inputs = {"last": np.zeros(1, np.int32), "total": np.zeros((), np.int32), **angles(self.config, self.context)}
        self._last, self._total = inputs["last"], inputs["total"]
        self._logits = np.zeros((1, self.config.vocab_size), np.float32)
        self._ids = np.zeros((1, 1), np.int64)
        for name, array in inputs.items():
            self._bound.bind_ortvalue_input(name, self._value(array))
        self._bound.bind_ortvalue_output("logits", self._value(self._logits))
        shape = (1, self.config.kv_heads, self.context, self.config.head_width)
        for name in (f"{part}.{layer}" for layer in range(self.config.layers) for part in ("key", "value")):
            cache = self._value(np.zeros(shape, np.float32))
            self._bound.bind_ortvalue_input(f"past_{name}", cache)
            self._bound.bind_ortvalue_output(f"present_{name}", cache)
        self.logits((0,), 0)

    def logits(self, ids: Sequence[int], past: int) -> Tensor:
        """Logits after `ids`, which follow `past` tokens: (vocabulary,), overwritten by the next call."""
        import numpy as np
        import torch

        if self._ids.shape[1] != len(ids) or not past:
            self._ids = np.zeros((1, len(ids)), np.int64)
            self._bound.bind_ortvalue_input("ids", self._value(self._ids))
        self._ids[0], self._total[()], self._last[0] = ids, past + len(ids), past + len(ids) - 1
        self._session.run_with_iobinding(self._bound)
        return torch.from_numpy(self._logits[0])

    def submit(self, request: Request) -> Stream:
        """Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds."""
        if self._session is None:
            raise RuntimeError("the session is closed")
        request.check(self.context, self.config.vocab_size)
        flight = Flight(request)
        self._flights.add(flight)
        self._worker.submit(self._run, flight)
        return Stream(flight)

    def _run(self, flight: Flight) -> None:
        try:
            self._generate(flight)
        except Exception as error:  # whatever the library raises goes to the reader, who is on another thread
            flight.error = flight.error or f"onnxruntime failed: {error}"
        finally:
            self._flights.discard(flight)
            flight.finished.set()

    def _generate(self, flight: Flight) -> None:
        import torch

        request = flight.request
        generator = torch.Generator().manual_seed(request.seed)
        ids: Sequence[int] = request.prompt
        past = 0
        while not flight.cancelled and flight.count < request.max_tokens:
            logits = self.logits(ids[: self.micro_batch], past)
            past, ids = past + len(ids[: self.micro_batch]), ids[self.micro_batch :]
            if ids:
                continue
            token = int(logits.argmax())
            if not logits[token].isfinite():
                flight.error = f"request {request.id}: the logits are not finite after {flight.count} tokens"
                return
            if request.temperature:
                shares = probabilities(logits, request.temperature, request.top_p)
                token = int(torch.multinomial(shares, 1, generator=generator))
            flight.arrived(token, time.perf_counter() - flight.sent)
            ids = (token,)

    def memory(self) -> dict[str, int | None]:
        return {"weights": self._weight_bytes, "kv_cache": self.context * self.kv_bytes_per_position}

    def close(self) -> None:
        for flight in list(self._flights):
            flight.cancelled = True
        self._worker.shutdown(wait=True)
        self._session = self._bound = None


def angles(config: ModelConfig, context: int) -> dict[str, Any]:
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
