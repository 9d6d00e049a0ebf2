"""Our own network the way PyTorch runs it fastest: compiled as a whole, a token is one call.

Eager PyTorch asks Python for every operation, a hundred times per token. Here `torch.compile` (Ansel et al. 2024,
https://doi.org/10.1145/3620665.3640366) sees one token as one graph: the KV cache is allocated once and written in
place, projections with the same input are one product, norms, rotations and gates become loops in C++ (on CUDA:
Triton kernels, replayed as one CUDA graph), and the likeliest token is chosen within. Prompts are read in chunks of a
few fixed sizes, padded at the end, so that only a few graphs exist. Integers are multiplied as they are: by torch's own
CPU kernels (`hasten.engine.compiled.matrices`) or by those of `native` (`hasten.engine.compiled.kernels`).

    python pipelines/evaluate.py engine=compiled variant=int4

The first load compiles for a minute or so (`compile_seconds`); what it made is found again in `<cache>/compiled`.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant
from hasten.engine.base import Dtype, Engine, Request, Session, Support
from hasten.engine.grids import apart, every, table
from hasten.engine.native import build
from hasten.engine.streaming import Flight, Stream
from hasten.engine.torch_options import check_device, check_follows, kept_in, prepare
from hasten.errors import UserError
from hasten.hardware import cpu_flags

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.engine.compiled.kernels import Product
    from hasten.engine.compiled.network import Network
    from hasten.model.grid import Grid

LARGEST_CHUNK = 4096
VNNI = {"avx512_vnni", "avx_vnni"}
"""Processors with one of these sum products of 8-bit integers in 32 bits; others in 16, where sums overflow."""


@dataclass
class Compiled(Engine):
    """weight_dtype auto is bfloat16; activations are of its type. kv_cache_dtype auto follows it; attention is computed
    in the cache's type.

    activation_dtype: auto rounds to 8 bits before a product with integers: with 8 bits per channel a prompt's, a scale
    for each token, with others every token's, a scale for every 32 values; the weights' type rounds nothing, for
    comparing answers.
    chunks: how many tokens of a prompt are read in one pass, the sizes there are; each is a graph to compile. compile:
    false leaves the same network to Python, for comparing answers.
    """

    chunks: list[int] = field(default_factory=lambda: [16, 128])
    compile: bool = True

    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self)
        check_follows(self, self.weights, "activation_dtype")
        if self.devices == ["cpu"] and Dtype.float16 in (self.weights, self.kv_cache):
            raise UserError("engine.weight_dtype and kv_cache_dtype must be bfloat16 or float32 on a CPU, got float16")
        if not self.chunks or self.chunks != sorted(set(self.chunks)) or not self.chunks[0] >= 2:
            raise UserError(f"engine.chunks must be sizes of at least 2 in ascending order, got {self.chunks}")
        if self.chunks[-1] > LARGEST_CHUNK:
            raise UserError(f"engine.chunks must be at most {LARGEST_CHUNK}, got {self.chunks[-1]}")

    @property
    def weights(self) -> Dtype:
        """The weights' type with `auto` resolved."""
        return Dtype.bfloat16 if self.weight_dtype is Dtype.auto else self.weight_dtype

    @property
    def kv_cache(self) -> Dtype:
        """The KV cache's type with `auto` resolved."""
        return self.weights if self.kv_cache_dtype is Dtype.auto else self.kv_cache_dtype

    @property
    def rounds(self) -> bool:
        """Whether activations may be rounded to 8 bits before a product with integers."""
        return self.activation_dtype is Dtype.auto and self.devices == ["cpu"]

    def product(self, grid: Grid) -> Product:
        """How integers on this grid are multiplied, whether or not there is a kernel for them."""
        from hasten.engine.compiled.kernels import Product
        from hasten.engine.compiled.matrices import unsupported

        fast = not VNNI.isdisjoint(cpu_flags())
        if self.rounds and fast and grid.bits == 8 and not grid.group_size:
            return Product.rounded
        command = build.compiler()
        if self.rounds and (fast or unsupported(grid)) and command and shutil.which(command[0]):
            return Product.packed
        return Product.widened

    def supports(self, variant: Variant) -> Support:
        from hasten.engine.compiled.matrices import unsupported
        from hasten.model.config_json import from_huggingface
        from hasten.model.grid import grid_of

        if self.compile and shutil.which(os.environ.get("CXX") or "g++") is None:
            return Support(reason="engine compiled needs a C++ compiler (g++, or the one that CXX names)")
        try:
            from_huggingface(variant.config)
            grid = grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        if grid is None:
            return Support(native_format=self.weights.name)
        if self.devices != ["cpu"]:
            return Support(reason=f"the kernels for integers are the CPU's: devices must be [cpu], got {self.devices}")
        if reason := apart(grid) or table(grid):
            return Support(reason=reason)

        def answer(kind: Grid) -> Support:
            refusal = unsupported(kind, self.product(kind))
            return Support(reason=refusal) if refusal else Support(native_format=kind.words)

        return every(grid, answer)

    def load(self, variant: Variant, cache: Path) -> CompiledSession:
        support = self.supports(variant)
        if not support:
            raise UserError(f"compiled cannot run {variant.path.name}: {support.reason}")
        prepare(self)
        return CompiledSession(self, variant, cache, str(support.native_format))

    def describe(self) -> Json:
        activations = self.activation_dtype if self.rounds else self.weights
        used = {"weight_dtype": self.weights.name, "activation_dtype": activations.name}
        own = {"kv_cache_dtype": self.kv_cache.name, "chunks": list(self.chunks), "compile": self.compile}
        return {**super().describe(), **used, **own}


class CompiledSession(Session):
    """One request at a time, on a thread of its own, which is also the one that loads and compiles.

    OpenMP keeps helpers for each thread that computes, and where it counts more of them than cores they sleep between
    two loops instead of waiting for the next: so nothing here computes on a second one.
    """

    def __init__(self, engine: Compiled, variant: Variant, cache: Path, kernel: str) -> None:
        import torch

        from hasten.engine.compiled.matrices import Stored
        from hasten.engine.compiled.network import Network
        from hasten.model.config_json import from_huggingface

        start = time.perf_counter()
        self.config = from_huggingface(variant.config)
        self.context = min(engine.max_context, self.config.context)
        self.chunks = [size for size in engine.chunks if size <= self.context] or engine.chunks[:1]
        dtype, kv_dtype = (getattr(torch, kind.name) for kind in (engine.weights, engine.kv_cache))
        length = self.context + self.chunks[0]  # the last chunk of a prompt may be padded

        def network() -> Network:
            stored = Stored(variant, dtype, engine.product)
            return Network(self.config, stored, length, kv_dtype).eval().to(engine.devices[0])

        self._worker = ThreadPoolExecutor(1, thread_name_prefix="compiled")
        self.network = self._worker.submit(network).result()
        self.load_seconds = time.perf_counter() - start
        rounding = self._rounding(cache)
        self.kernel = ", ".join([kernel, *rounding, *["compiled"] * engine.compile])
        self.arithmetic = "int8" if self.network.rounded_share > 0.5 else engine.weights.name
        self.weight_bytes_per_token = self.network.weight_bytes_per_token
        self.kv_bytes_per_position = self.network.cache_bytes // length
        self.places = torch.arange(length, device=engine.devices[0])
        self.step: Callable[..., Any] = self.network.step
        self.choose: Callable[..., Any] = self.network.choose
        self.read: dict[int, Callable[..., Any]] = dict.fromkeys(self.chunks, self.network.read)
        self._flights: set[Flight] = set()
        if engine.compile:
            with kept_in(cache / "compiled"):
                self._worker.submit(self._compile).result()

    def _rounding(self, cache: Path) -> Iterator[str]:
        """In words, what is rounded; with the kernels at hand that multiply it."""
        from hasten.engine.compiled.kernels import Product, load

        products = {matrix.product for matrix in self.network.rounded()}
        if Product.rounded in products:
            yield Product.rounded.value
        if Product.packed in products:
            start = time.perf_counter()
            yield f"{Product.packed.value} ({load(cache)})"
            self.compile_seconds += time.perf_counter() - start

    def _compile(self) -> None:
        """Compile the pass of a token and of each chunk by making them: CUDA graphs are recorded in the second."""
        import torch

        start = time.perf_counter()
        self.step, self.choose = (compiled(self.network, name) for name in ("step", "choose"))
        self.read = {size: compiled(self.network, "read") for size in self.chunks}
        seen = self._seen(len(self.places) - 1)  # no pass looks back on all: where the end is not met, it stays open
        if seen.device.type == "cpu":
            torch._dynamo.mark_dynamic(seen, 0)
        with torch.no_grad():
            for _ in range(3):
                for size, read in self.read.items():
                    token, _ = self.choose(read(self.places[:size], self.places[:size], seen)[:1].clone())
                self.step(token.clone(), self.places[:1], seen)
        self.network.clear()
        self.compile_seconds += time.perf_counter() - start

    def submit(self, request: Request) -> Stream:
        """Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds."""
        request.check(self.context, self.config.vocab_size)
        flight = Flight(request)
        self._flights.add(flight)
        self._worker.submit(self._run, flight)
        return Stream(flight)

    def _run(self, flight: Flight) -> None:
        import torch

        try:
            with torch.no_grad():
                self._generate(flight)
        except Exception as error:  # whatever torch raises goes to the reader, who is on another thread
            flight.error = str(error)
        finally:
            self._flights.discard(flight)
            flight.finished.set()

    def _generate(self, flight: Flight) -> None:
        import torch

        from hasten.engine.sampling import probabilities

        request, at = flight.request, len(flight.request.prompt)
        generator = torch.Generator(self.places.device).manual_seed(request.seed)
        found = self._prompt(flight)
        while found is not None and not flight.cancelled:
            token, logits = found
            if not math.isfinite(float(logits[token])):
                self.network.clear()  # what is not a number would stay one behind every mask
                raise RuntimeError(f"request {request.id}: the logits are not finite after {flight.count} tokens")
            if request.temperature:
                shares = probabilities(logits, request.temperature, request.top_p)
                token = torch.multinomial(shares, 1, generator=generator)
            flight.arrived(int(token), time.perf_counter() - flight.sent)
            if flight.count == request.max_tokens or flight.cancelled:
                return
            found = self.step(token.clone(), self.places[at : at + 1], self._seen(at + 1))
            at += 1

    def _prompt(self, flight: Flight) -> tuple[Tensor, Tensor] | None:
        """The likeliest first token (1) and the logits behind it, or None if the request was cancelled meanwhile."""
        import torch

        ids = torch.tensor(flight.request.prompt, device=self.places.device)
        for start, size in passes(len(ids), self.chunks):
            if flight.cancelled:
                return None
            chunk = ids[start : start + size]
            padded = torch.nn.functional.pad(chunk, (0, size - len(chunk)))
            x = self.read[size](padded, self.places[start : start + size], self._seen(start + size))
        found: tuple[Tensor, Tensor] = self.choose(x[len(chunk) - 1 : len(chunk)].clone())
        return found

    def _seen(self, end: int) -> Tensor:
        """The places that a pass up to `end` looks back on; where graphs are replayed, always all there are."""
        return self.places[:end] if self.places.device.type == "cpu" else self.places

    def memory(self) -> dict[str, int | None]:
        return {"weights": self.network.weight_bytes, "kv_cache": self.network.cache_bytes}

    def close(self) -> None:
        for flight in list(self._flights):
            flight.cancelled = True
        self._worker.shutdown(wait=True)
        del self.network, self.step, self.choose, self.read


def passes(length: int, sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Where the passes over a prompt start, and their sizes: the largest that it fills, at its end the smallest."""
    start = 0
    while start < length:
        size = max((size for size in sizes if size <= length - start), default=min(sizes))
        yield start, size
        start += size


def compiled(network: Network, name: str) -> Callable[..., Any]:
    """A method of the network as one graph.

    torch keeps what it compiled by code object and looks before each call for the one that fits, which takes 0.4 ms for
    twelve layers. Here every graph has a code object, a network and shapes of its own: there is nothing to look for.
    """
    import torch

    method = getattr(network, name)
    function = method.__func__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, name)
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    if network.cos.device.type == "cpu":
        options["cpp.enable_floating_point_contract_flag"] = "fast"  # a product and a sum are one instruction
        options["realize_reads_threshold"] = 1  # what every row of a matrix is multiplied with is computed once
    else:
        options["triton.cudagraphs"] = True  # what mode="reduce-overhead" stands for
    return torch.compile(types.MethodType(own, network), fullgraph=True, options=options)
