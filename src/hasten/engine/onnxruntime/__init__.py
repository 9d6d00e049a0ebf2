"""ONNX Runtime: a graph of fused operators, and integer kernels that come with one `pip install` on any processor.

A variant becomes an ONNX graph once (`hasten.engine.onnxruntime.graph`), its integers the blocks of MatMulNBits
(`blocks`), bit for bit. Those are multiplied as they lie: by default with activations that are rounded to 8 bits, a
scale for each block (`accuracy_level` 4), or with float32 activations (level 1), for comparing answers.

The loop over tokens is our own (`model` is one call of it) and needs `onnxruntime` alone; `onnxruntime-genai` would be
a second wheel around that same call, with a search and a tokenizer that we do not want. Requests that run at the same
time share the reading of the weights: each pass gives every one of them a token. Prompts go first, one by one.

ONNX Runtime reports to its makers by default, which is switched off before it is imported (`runtime`).

    python pipelines/evaluate.py engine=onnxruntime variant=int4 engine.slots=8
"""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import SCHEMA, Json, Variant, read_json, write_json
from hasten.engine.base import Dtype, Engine, Request, Session, Support, built
from hasten.engine.grids import every, table
from hasten.engine.onnxruntime.model import Model
from hasten.engine.onnxruntime.runtime import rounds_activations
from hasten.engine.sampling import probabilities
from hasten.engine.streaming import Flight, Stream
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from hasten.model.grid import Grid


@dataclass
class Onnxruntime(Engine):
    """Weights that a variant leaves in float and the KV cache are float32.

    activation_dtype: auto rounds to 8 bits before a product with integers; float32 rounds nothing, for comparing
    answers. micro_batch: prompt tokens computed at a time. slots: requests that run at the same time, each with a
    context of max_context.
    """

    micro_batch: int = 512
    slots: int = 1

    batches: ClassVar[bool] = True
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
        if not 1 <= self.slots <= 256:
            raise UserError(f"engine.slots must be 1 to 256, got {self.slots}")

    def supports(self, variant: Variant) -> Support:
        from hasten.model.grid import grid_of
        from hasten.model.low_rank_config import decoder_shape

        missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
        if missing:
            return Support(reason=f'{missing[0]} is not installed: pip install "hasten[onnxruntime]"')
        try:
            shape, grid = decoder_shape(variant.config), grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        if shape.head_width % 16:
            return Support(reason=f"GroupQueryAttention turns heads of a multiple of 16 values, got {shape.head_width}")
        if reason := table(grid):
            return Support(reason=reason)
        return every(grid, self._supports_grid) if grid else Support(native_format="float32")

    def _supports_grid(self, grid: Grid) -> Support:
        from hasten.engine.onnxruntime.blocks import BLOCKS, block_size

        bits, group_size = grid.bits, grid.group_size
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
        from hasten.model.grid import grid_of
        from hasten.model.huggingface import checked_tensors
        from hasten.model.low_rank_config import decoder_shape

        arithmetic = self.arithmetic(variant)
        level = graph.INT8_ACTIVATIONS if arithmetic == "int8" else graph.FLOAT_ACTIVATIONS

        def make(folder: Path) -> None:
            config = decoder_shape(variant.config)
            sizes = graph.write(config, checked_tensors(variant), grid_of(variant), level, folder)
            write_json(folder / "manifest.json", {"schema": SCHEMA, "kind": "onnx", **sizes})

        return built(cache / "onnxruntime" / f"{variant.hash}-{arithmetic}-{graph.FORMAT}", make)

    def load(self, variant: Variant, cache: Path) -> OnnxruntimeSession:
        from hasten.model.grid import grid_of

        support = self.supports(variant)
        if not support:
            raise UserError(f"onnxruntime cannot run {variant.path.name}: {support.reason}")
        grid = grid_of(variant)
        rounding = grid.kinds if grid and self.arithmetic(variant) == "int8" else ()
        if not all(rounds_activations(kind.bits) for kind in rounding):
            raise UserError("onnxruntime has no integer kernels for this processor, it would dequantise in every pass")
        start = time.perf_counter()
        folder = self.build(variant, cache)
        ready = time.perf_counter()
        session = OnnxruntimeSession(self, folder, variant, str(support.native_format))
        session.compile_seconds, session.load_seconds = ready - start, time.perf_counter() - ready
        return session

    def describe(self) -> Json:
        types = dict.fromkeys(("weight_dtype", "kv_cache_dtype"), Dtype.float32.name)
        return {**super().describe(), **types, "micro_batch": self.micro_batch, "slots": self.slots}


@dataclass
class Answer:
    """A request that runs. past: its tokens that the cache holds. newest: what it drew last."""

    flight: Flight
    generator: Generator
    past: int = 0
    newest: int = 0

    @property
    def over(self) -> bool:
        return self.flight.cancelled or self.flight.count >= self.flight.request.max_tokens

    def take(self, logits: Tensor) -> None:
        """Choose a token by its logits (vocabulary,)."""
        import torch

        flight, request = self.flight, self.flight.request
        self.newest = int(logits.argmax())
        if not logits[self.newest].isfinite():
            flight.error = f"request {request.id}: the logits are not finite after {flight.count} tokens"
            flight.cancelled = True
            return
        if request.temperature:
            shares = probabilities(logits, request.temperature, request.top_p)
            self.newest = int(torch.multinomial(shares, 1, generator=self.generator))
        flight.arrived(self.newest, time.perf_counter() - flight.sent)


class OnnxruntimeSession(Session):
    """Requests side by side, on a thread of its own. `submit` may be called from several threads."""

    def __init__(self, engine: Onnxruntime, folder: Path, variant: Variant, native_format: str) -> None:
        from hasten.model.cost import cost_of
        from hasten.model.low_rank_config import decoder_shape

        config = decoder_shape(variant.config)
        self.context, self.vocabulary = min(engine.max_context, config.context), config.vocab_size
        self.slots, self.micro_batch = engine.slots, engine.micro_batch
        self.kernel, self.arithmetic = native_format, engine.arithmetic(variant)
        sizes = read_json(folder / "manifest.json")
        self.weight_bytes_per_token, self._weight_bytes = sizes["weight_bytes_per_token"], sizes["weight_bytes"]
        self.kv_bytes_per_position = cost_of(config).kv_bytes(1, 4)
        self.model = Model(folder / "model.onnx", config, self.context, engine.slots, engine.thread_count)
        self._flights: set[Flight] = set()
        self._waiting: deque[Flight] = deque()
        self._running: list[Answer] = []  # by slot
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")

    def submit(self, request: Request) -> Stream:
        """Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds."""
        if self.model.closed:
            raise RuntimeError("the session is closed")
        request.check(self.context, self.vocabulary)
        flight = Flight(request)
        self._flights.add(flight)
        self._waiting.append(flight)
        self._worker.submit(self._serve)
        return Stream(flight)

    def _serve(self) -> None:
        """Until nobody is left: whoever waits gets a free slot and its prompt read, then all that run get a token."""
        while self._waiting or self._running:
            try:
                while self._waiting and len(self._running) < self.slots:
                    self._begin(self._waiting.popleft())
                self._step()
            except Exception as error:  # whatever the library raises goes to the readers, who are on other threads
                for answer in self._running:
                    answer.flight.error, answer.flight.cancelled = f"onnxruntime failed: {error}", True
                self._sweep()

    def _begin(self, flight: Flight) -> None:
        import torch

        answer = Answer(flight, torch.Generator().manual_seed(flight.request.seed))
        self._running.append(answer)
        ids, slot = flight.request.prompt, len(self._running) - 1
        while ids and not flight.cancelled:
            part, ids = ids[: self.micro_batch], ids[self.micro_batch :]
            logits = self.model.logits([part], [answer.past], slot)
            answer.past += len(part)
        if not flight.cancelled:
            answer.take(logits[0])
        self._sweep()

    def _step(self) -> None:
        """One token for each that runs, in one pass."""
        if not self._running:
            return
        logits = self.model.logits([[a.newest] for a in self._running], [a.past for a in self._running])
        for answer, row in zip(self._running, logits, strict=True):
            answer.past += 1
            if not answer.over:
                answer.take(row)
        self._sweep()

    def _sweep(self) -> None:
        """Let go of those that are over; the last one moves into a gap, so that a pass has no idle rows."""
        for slot in reversed(range(len(self._running))):
            answer = self._running[slot]
            if answer.over:
                last = self._running.pop()
                if last is not answer:
                    self.model.move(len(self._running), slot, last.past)
                    self._running[slot] = last
                self._flights.discard(answer.flight)
                answer.flight.finished.set()

    def memory(self) -> dict[str, int | None]:
        return {"weights": self._weight_bytes, "kv_cache": self.slots * self.context * self.kv_bytes_per_position}

    def close(self) -> None:
        for flight in list(self._flights):
            flight.cancelled = True
        self._worker.shutdown(wait=True)
        self.model.close()
