"""OpenVINO: Intel's compiler and kernels for its own and other x86-64 processors, in this process.

The decoder is written as a graph of its own (`hasten.engine.openvino.graph`) from a variant's integers, which stay
compressed in memory, and compiled by the plugin at every load (no file of OpenVINO's can hold paged attention). That
lets requests share a pass (`slots`); what a pass computes is decided here (`hasten.engine.openvino.passes`), as is the
next token: logits are at hand, so that seeds draw the same tokens again and a number that is not finite never passes
for an answer.

OpenVINO's defaults trade answers for speed without a word: bfloat16 between products, a KV cache of 8 bits,
activations rounded to 8 bits. Here each is an option or off, and recorded; `activation_dtype=float32` rounds nothing.

    python pipelines/evaluate.py engine=openvino variant=int4 engine.slots=8
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections import deque
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant
from hasten.engine.base import Dtype, Engine, Request, Session, Support
from hasten.engine.grids import every, table
from hasten.engine.openvino.graph import BLOCK, RELEASE, Graph
from hasten.engine.openvino.runtime import cache_for, kernels, properties, runtime
from hasten.engine.streaming import Flight, Stream
from hasten.errors import UserError
from hasten.hardware import cpu_flags

if TYPE_CHECKING:
    from hasten.engine.openvino.passes import Pass, Sequence
    from hasten.model.config import ModelConfig
    from hasten.model.grid import Grid, Grids

GROUPS = (0, 16, 32, 64, 128, 256)
CACHES = {Dtype.float32: (Dtype.float16, Dtype.float32, Dtype.int8), Dtype.bfloat16: (Dtype.bfloat16, Dtype.int8)}
"""What the plugin keeps keys and values in, by the type of the activations; the first is `auto`."""


@dataclass
class Openvino(Engine):
    """weight_dtype auto is bfloat16 where the processor multiplies it, else float32. kv_cache_dtype auto is float16,
    and bfloat16 where the activations are.

    activation_dtype: auto multiplies integers with activations that are rounded to 8 bits (all else in float32), and
    bfloat16 weights with bfloat16 where the processor can; float32 and bfloat16 take every product in that type.
    activation_group: how many activations that are rounded share a scale; 0 rounds none. micro_batch: tokens of one
    pass. slots: requests that run at the same time, each with a context of max_context.
    """

    activation_group: int = 32
    micro_batch: int = 512
    slots: int = 1

    batches: ClassVar[bool] = True
    int8_cache: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("openvino",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices != ["cpu"]:
            raise UserError(f"engine.devices must be [cpu] for openvino, got {self.devices}")
        for name in ("weight_dtype", "activation_dtype"):
            if getattr(self, name) is Dtype.float16:
                raise UserError(f"engine.{name} must be auto, bfloat16 or float32 for openvino, got float16")
        if self.activation_dtype is Dtype.bfloat16 and self.weight_dtype is Dtype.float32:
            raise UserError("engine.weight_dtype must be auto or bfloat16 beside bfloat16 activations, got float32")
        if self.activation_group not in GROUPS:
            raise UserError(f"engine.activation_group must be one of {GROUPS}, got {self.activation_group}")
        if not 1 <= self.slots <= 256:
            raise UserError(f"engine.slots must be 1 to 256, got {self.slots}")
        if not self.slots <= self.micro_batch <= 4096:
            raise UserError(f"engine.micro_batch must be slots ({self.slots}) to 4096, got {self.micro_batch}")

    @property
    def weights(self) -> Dtype:
        """The type of float weights with `auto` resolved."""
        fastest = Dtype.bfloat16 if has_bfloat16() else Dtype.float32
        return fastest if self.weight_dtype is Dtype.auto else self.weight_dtype

    def activations(self, grid: Grid | Grids | None) -> Dtype:
        """The type of everything that is not rounded, with `auto` resolved. grid: the variant's, None for floats."""
        if self.activation_dtype is not Dtype.auto:
            return self.activation_dtype
        plain = not grid and self.weights is Dtype.bfloat16
        return Dtype.bfloat16 if plain and has_bfloat16() else Dtype.float32

    def kv_cache(self, grid: Grid | Grids | None) -> Dtype:
        """The KV cache's type with `auto` resolved."""
        return CACHES[self.activations(grid)][0] if self.kv_cache_dtype is Dtype.auto else self.kv_cache_dtype

    def rounded(self, grid: Grid | Grids | None) -> int:
        """How many activations share a scale before a product with integers; 0 if they are not rounded."""
        rounds = grid and self.activation_dtype is Dtype.auto and {"avx512_vnni", "avx_vnni"} & {*cpu_flags()}
        return self.activation_group if rounds else 0

    def supports(self, variant: Variant) -> Support:
        from hasten.model.grid import grid_of
        from hasten.model.low_rank_config import decoder_shape

        if importlib.util.find_spec("openvino") is None:
            return Support(reason='openvino is not installed: pip install "hasten[openvino]"')
        if not metadata.version("openvino").startswith(f"{RELEASE}."):
            return Support(reason=f"its graph is made for OpenVINO {RELEASE}, got {metadata.version('openvino')}")
        try:
            shape, grid = decoder_shape(variant.config), grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        if self.activation_dtype is Dtype.bfloat16 and not has_bfloat16():
            return Support(reason="this processor has no bfloat16: activation_dtype must be auto or float32")
        if not grid and self.activations(grid) is not self.weights:
            return Support(
                reason="OpenVINO widens bfloat16 weights beside float32 activations: weight_dtype must be float32"
            )
        kept = CACHES[self.activations(grid)]
        if self.kv_cache(grid) not in kept:
            return Support(
                reason=f"beside {self.activations(grid).name} activations kv_cache_dtype must be auto or "
                f"{' or '.join(dtype.name for dtype in kept)}, got {self.kv_cache_dtype.name}"
            )
        if grid is None:
            return Support(native_format=self.weights.name)
        if reason := table(grid):
            return Support(reason=reason)
        return every(grid, lambda kind: self._supports_grid(kind, shape))

    def _supports_grid(self, grid: Grid, shape: ModelConfig) -> Support:
        from hasten.model.low_rank_config import ranks

        bits, group = grid.bits, grid.group_size
        if "avx2" not in cpu_flags():
            return Support(reason="OpenVINO multiplies compressed weights on x86-64 with AVX2")
        if group & (group - 1):
            return Support(reason=f"OpenVINO's kernels are right for groups of a power of two, got group_size {group}")
        if bits == 4 and any(rank % 2 for rank in ranks(shape).values()):
            return Support(reason="OpenVINO's kernels are right for 4-bit rows of an even length: some rank is odd")
        if bits == 4 and (shape.hidden_size % 2 or shape.feed_forward_size % 2):
            return Support(reason="OpenVINO's kernels are right for 4-bit rows of an even length: hidden_size and "
                           f"feed_forward_size are {shape.hidden_size} and {shape.feed_forward_size}")  # fmt: skip
        if group and self.rounded(grid) > group:
            return Support(reason=f"activation_group must be at most group_size ({group}), got {self.activation_group}")
        return Support(native_format=grid.words)

    def load(self, variant: Variant, cache: Path) -> OpenvinoSession:
        support = self.supports(variant)
        if not support:
            raise UserError(f"openvino cannot run {variant.path.name}: {support.reason}")
        return OpenvinoSession(self, variant)

    def describe(self) -> Json:
        own = {"activation_group": self.activation_group, "micro_batch": self.micro_batch, "slots": self.slots}
        return {**super().describe(), "weight_dtype": self.weights.name, **own}


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16."""
    return bool({"avx512_bf16", "amx_bf16"} & {*cpu_flags()})


class OpenvinoSession(Session):
    """A compiled graph and a thread that makes its passes. `submit` may be called from several threads."""

    kept = False

    def __init__(self, engine: Openvino, variant: Variant) -> None:
        from hasten.engine.openvino.passes import Pass, Sequence
        from hasten.model.grid import grid_of
        from hasten.model.low_rank_config import decoder_shape

        start = time.perf_counter()
        config, grid = decoder_shape(variant.config), grid_of(variant)
        float_bytes = 4 if engine.activations(grid) is Dtype.float32 else 2
        graph = Graph(config, variant.tensors(), grid, engine.weights.name, float_bytes)
        model = graph.model()
        ready = time.perf_counter()
        compiled = runtime().Core().compile_model(model, "CPU", properties(engine, grid))
        self.compile_seconds = time.perf_counter() - ready
        self.context, self.vocabulary = min(engine.max_context, config.context), config.vocab_size
        self.weight_bytes_per_token, self._weight_bytes = graph.bytes_per_token, graph.bytes
        self._blocks, self._most = -(-self.context // BLOCK), engine.micro_batch
        self._request: Any = compiled.create_infer_request()
        ports = [port for port in compiled.inputs if "_cache." in port.any_name]
        self._caches = {port.any_name: cache_for(port, engine.slots * self._blocks) for port in ports}
        for name, cache in self._caches.items():
            self._request.set_tensor(name, cache)
        self._inputs: dict[
            str, Any
        ] = {}  # what the request reads, written anew where the next pass is of the same shape
        self._kv_bytes = sum(cache.byte_size for cache in self._caches.values())
        self.kv_bytes_per_position = self._kv_bytes // (engine.slots * self._blocks * BLOCK)
        self._logits(Pass([(Sequence(Flight(Request(0, (0,), 1)), 0, [0]), 1)]))  # kernels are chosen with the first
        rounded = engine.rounded(grid)
        self.kernel = f"{kernels(compiled)}{f', activations in int8 groups of {rounded}' if rounded else ''}"
        self.arithmetic = "int8" if rounded else engine.activations(grid).name
        self._slots = list(range(engine.slots))
        self._sequences: list[Sequence] = []
        self._queue: deque[Flight] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._worker = threading.Thread(target=self._serve, name="openvino", daemon=True)
        self._worker.start()
        self.load_seconds = time.perf_counter() - start - self.compile_seconds

    def submit(self, request: Request) -> Stream:
        """Send `request`; tokens arrive on the stream that is returned.

        Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds.
        """
        request.check(self.context, self.vocabulary)
        flight = Flight(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the session is closed")
            self._queue.append(flight)
            self._changed.notify()
        return Stream(flight)

    def _serve(self) -> None:
        """The worker: a pass after the other, while there is something to compute."""
        while self._admit():
            try:
                self._compute()
            except Exception as error:  # whatever the library raises goes to the readers, who are on other threads
                for sequence in list(self._sequences):
                    sequence.flight.error = f"OpenVINO failed: {error}"
                    self._retire(sequence)

    def _admit(self) -> bool:
        """Give free slots to those who wait longest, and wait for somebody if there is nobody; False to stop."""
        from hasten.engine.openvino.passes import Sequence

        with self._changed:
            while True:
                for sequence in [one for one in self._sequences if one.flight.cancelled or self._closed]:
                    self._retire(sequence)
                for flight in [one for one in self._queue if one.cancelled or self._closed]:
                    self._queue.remove(flight)
                    flight.finished.set()
                while self._queue and self._slots:
                    flight = self._queue.popleft()
                    self._sequences.append(Sequence(flight, self._slots.pop(), list(flight.request.prompt)))
                if self._sequences or self._closed:
                    return not self._closed
                self._changed.wait()

    def _compute(self) -> None:
        from hasten.engine.openvino.passes import Pass

        now = Pass.of(self._sequences, self._most)
        logits = self._logits(now)  # (ready, vocabulary)
        ready = now.ready
        for sequence, count in now.parts:
            sequence.cached += count
        for sequence, row in zip(ready, logits, strict=True):
            flight, token = sequence.flight, sequence.draw(row)
            if token is None:
                flight.error = f"request {flight.request.id}: the logits are not finite after {flight.count} tokens"
                self._retire(sequence)
                continue
            flight.arrived(token, time.perf_counter() - flight.sent)
            sequence.ids.append(token)
            if flight.cancelled or flight.count == flight.request.max_tokens:
                self._retire(sequence)

    def _logits(self, now: Pass) -> Any:
        """Of the tokens that were wanted, (wanted, vocabulary); the next pass writes over them."""
        for name, values in now.inputs(self._blocks).items():
            held = self._inputs.get(name)
            if held is None or held.shape != values.shape:
                tensor = runtime().Tensor(values)
                self._request.set_tensor(name, tensor)
                self._inputs[name] = tensor.data
            else:
                held[...] = values
        self._request.infer(share_outputs=True)  # else all logits are copied, to be thrown away
        return self._request.get_output_tensor(0).data[:, 0]

    def _retire(self, sequence: Sequence) -> None:
        """Free its slot; what it leaves there is overwritten before anybody reads it."""
        self._sequences.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.flight.finished.set()

    def memory(self) -> dict[str, int | None]:
        return {"weights": self._weight_bytes, "kv_cache": self._kv_bytes}

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()
        self._request = None
        self._caches, self._inputs = {}, {}
