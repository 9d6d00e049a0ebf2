"""`transformers.generate`: what people run today, and so the baseline that a speed-up should be told against.

Plain, it makes one Python call per layer and token, with a cache that grows. With `compile`, the cache is static and
the forward pass goes through `torch.compile`, whose work is kept between runs (`compile_seconds`). A quantised variant
is loaded as transformers loads it, which on a CPU means dequantised: labelled so, and never a candidate for speed.

    python pipelines/evaluate.py engine=transformers engine.weight_dtype=bfloat16 engine.compile=true
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant
from hasten.engine.base import Dtype, Engine, Request, Session, Support
from hasten.engine.grids import table
from hasten.engine.streaming import Flight, Stream
from hasten.engine.torch_options import check_device, check_follows, kept_in, prepare
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Transformers(Engine):
    """weight_dtype auto is bfloat16; activations and the KV cache are of the weights' type.

    compile: static KV cache and `torch.compile`.
    """

    compile: bool = False

    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self)
        check_follows(self, self.weights, "activation_dtype", "kv_cache_dtype")

    @property
    def weights(self) -> Dtype:
        """The weights' type with `auto` resolved."""
        return Dtype.bfloat16 if self.weight_dtype is Dtype.auto else self.weight_dtype

    def supports(self, variant: Variant) -> Support:
        from hasten.model.config_json import from_huggingface
        from hasten.model.grid import grid_of

        try:
            from_huggingface(variant.config)
            grid = grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        if reason := table(grid):  # its reader makes no tied head of packed embeddings
            return Support(reason=reason)
        if grid:
            return Support(native_format=f"{self.weights.name} (dequantised)", native=False)
        return Support(native_format=self.weights.name)

    def load(self, variant: Variant, cache: Path) -> TransformersSession:
        from hasten.model.huggingface import checked_tensors

        support = self.supports(variant)
        if not support:
            raise UserError(f"transformers cannot run {variant.path.name}: {support.reason}")
        checked_tensors(variant)  # its reader fills what is missing with numbers of its own
        prepare(self)
        with kept_in(cache / "transformers") if self.compile else nullcontext():
            return TransformersSession(self, variant, str(support.native_format))

    def describe(self) -> Json:
        types = dict.fromkeys(("weight_dtype", "activation_dtype", "kv_cache_dtype"), self.weights.name)
        return {**super().describe(), **types, "compile": self.compile}


class TransformersSession(Session):
    """One request at a time, on a thread of its own."""

    def __init__(self, engine: Transformers, variant: Variant, kernel: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        from hasten.model.config_json import from_huggingface
        from hasten.model.cost import cost_of

        start = time.perf_counter()
        dtype = getattr(torch, engine.weights.name)
        self.model: Any = AutoModelForCausalLM.from_pretrained(variant.path, dtype=dtype, local_files_only=True)
        self.model.eval().to(engine.devices[0])
        self.model.generation_config = GenerationConfig()  # nothing stops, samples or bans but what a request says
        config = from_huggingface(variant.config)
        cost = cost_of(config)
        self.context, self.vocabulary = min(engine.max_context, config.context), config.vocab_size
        self.kernel, self.arithmetic = f"{kernel}{', compiled' if engine.compile else ''}", engine.weights.name
        self.weight_bytes_per_token = cost.parameters_per_token * dtype.itemsize
        self.kv_bytes_per_position = int(cost.kv_bytes(1, dtype.itemsize))
        self.options: dict[str, Any] = {}
        self._flights: set[Flight] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="transformers")
        self.load_seconds = time.perf_counter() - start
        if engine.compile:
            self._compile()

    def _compile(self) -> None:
        """Compile the passes of a prompt and of a token, by making each twice."""
        import torch

        start = time.perf_counter()
        # room for every request from the start: a cache that grew would be compiled for anew
        self.options = {"cache_implementation": "static", "max_cache_len": self.context}
        self.model.forward = torch.compile(self.model.forward, dynamic=None)
        for length in (2, 3):
            list(self.submit(Request(0, tuple(range(length)), 3)))
        self.compile_seconds = time.perf_counter() - start

    def submit(self, request: Request) -> Stream:
        """Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds."""
        request.check(self.context, self.vocabulary)
        flight = Flight(request)
        self._flights.add(flight)
        self._worker.submit(self._run, flight)
        return Stream(flight)

    def _run(self, flight: Flight) -> None:
        try:
            if not flight.cancelled:
                self._generate(flight)
        except Exception as error:  # whatever the library raises goes to the reader, who is on another thread
            flight.error = flight.error or f"transformers failed: {error}"
        finally:
            self._flights.discard(flight)
            flight.finished.set()

    def _generate(self, flight: Flight) -> None:
        import torch

        request, tail = flight.request, Tail(flight)
        ids = torch.tensor([request.prompt], device=self.model.device)
        options = dict(self.options, streamer=tail, stopping_criteria=[tail.over], do_sample=request.temperature > 0)
        if request.temperature:
            options |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
        if request.verify:
            options["logits_processor"] = [tail.check]
        torch.manual_seed(request.seed)
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            self.model.generate(ids, attention_mask=mask, max_new_tokens=request.max_tokens, pad_token_id=0, **options)

    def memory(self) -> dict[str, int | None]:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return {"weights": weights, "kv_cache": None}

    def close(self) -> None:
        for flight in list(self._flights):
            flight.cancelled = True
        self._worker.shutdown(wait=True)
        self.model = None


class Tail:
    """What `generate` tells of its tokens: a streamer, and what it asks after each of them."""

    def __init__(self, flight: Flight) -> None:
        self.flight, self.in_prompt = flight, True

    def put(self, ids: Tensor) -> None:
        seconds = time.perf_counter() - self.flight.sent
        if self.in_prompt:  # it is streamed, too
            self.in_prompt = False
            return
        self.flight.arrived(int(ids.view(-1)[0]), seconds)

    def end(self) -> None:
        pass

    def over(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        import torch

        stops = self.flight.cancelled or int(ids[0, -1]) in self.flight.request.stop
        return torch.full((ids.shape[0],), stops, device=ids.device)

    def check(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.max().isfinite()):
            self.flight.error = (
                f"request {self.flight.request.id}: the logits are not finite after {self.flight.count} tokens"
            )
            raise RuntimeError(self.flight.error)
        return scores
