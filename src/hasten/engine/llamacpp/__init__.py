"""llama.cpp, in this process, through `xllamacpp`: its prebuilt wheel, or a build for this machine (`build`).

At batch 1 decoding a token reads every weight once, so fewer bytes per weight is more speed, if the
kernel multiplies the integers as they lie in memory. llama.cpp's Q8_0 and Q4_0 do, and they are
exactly our 8-bit and 4-bit grids: a variant's own integers are packed (`hasten.engine.gguf`), once, into
`<cache>/llamacpp/<variant hash>-<weight_dtype>-<format>/model.gguf`. The integers meet activations
that llama.cpp rounds to 8 bits on the fly; float matrices meet activations of their own type.

What is measured is the wheel's C++ server with nothing between it and us but a callback per token:
greedy, no prompt cache (a prefill is always a real prefill), no warm-up behind our back, weights read
into memory at load. The tokenizer stays out of it: the cached file names token 17 `17`, so each
streamed piece says which id was generated (real pieces would not: the server holds back a token that
ends inside a UTF-8 character) and no token ends a text unless the request says so.

The wheel always opens an HTTP port. It is bound to loopback, on a free port, behind a random key.

    python pipelines/evaluate.py engine=llamacpp engine.weight_dtype=float16
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant, read_json, write_json
from hasten.engine import gguf
from hasten.engine.base import Dtype, Engine, Request, Session, Support, built
from hasten.engine.llamacpp.build import instructions, own_build
from hasten.engine.llamacpp.conversion import Conversion, Converter
from hasten.engine.streaming import Flight, Stream
from hasten.errors import UserError

if TYPE_CHECKING:
    import xllamacpp

CONTEXT_MULTIPLE = 256  # llama.cpp allocates the KV cache in steps of this many tokens
LARGEST_MICRO_BATCH = 2048
CACHE_BYTES = {Dtype.float32: 4, Dtype.float16: 2, Dtype.bfloat16: 2, Dtype.int8: 34 / 32}
"""Of a value of the KV cache; Q8_0 has a float16 scale for every 32."""


class FlashAttention(Enum):
    """Whether attention runs as one fused kernel."""

    auto = "auto"
    enabled = "enabled"
    disabled = "disabled"


@dataclass
class Llamacpp(Engine):
    """weight_dtype auto and kv_cache_dtype auto are float16. activation_dtype follows the weights' format.

    kv_cache_dtype int8 is Q8_0, which fused attention alone reads.

    flash_attention: fused attention; with a float32 KV cache `disabled` is faster (1.0 against 1.8 ms
    per token on a 7M-parameter model). micro_batch: prompt tokens computed at a time. slots: requests
    that run at the same time, each with a context of max_context. conversion: llama.cpp's own four bits instead of the
    variant's numbers, for comparison with what its users have (`hasten.engine.llamacpp.conversion`).
    """

    conversion: Conversion = Conversion.none
    flash_attention: FlashAttention = FlashAttention.auto
    micro_batch: int = 512
    slots: int = 1

    batches: ClassVar[bool] = True
    int8_cache: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("xllamacpp",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices != ["cpu"]:
            raise UserError(f"engine.devices must be [cpu] for llamacpp, got {self.devices}")
        if not 1 <= self.micro_batch <= LARGEST_MICRO_BATCH:
            raise UserError(f"engine.micro_batch must be 1 to {LARGEST_MICRO_BATCH}, got {self.micro_batch}")
        if not 1 <= self.slots <= 256:
            raise UserError(f"engine.slots must be 1 to 256, got {self.slots}")
        if self.kv_cache_dtype is Dtype.int8 and self.flash_attention is FlashAttention.disabled:
            raise UserError("engine.flash_attention must be auto or enabled for an int8 KV cache, got disabled")

    @classmethod
    def versions(cls) -> dict[str, str | None]:
        return {name: found and f"{found}{own_build()}" for name, found in super().versions().items()}

    @property
    def weights(self) -> Dtype:
        """The type of float weights with `auto` resolved."""
        return Dtype.float16 if self.weight_dtype is Dtype.auto else self.weight_dtype

    @property
    def kv_cache(self) -> Dtype:
        """The KV cache's type with `auto` resolved."""
        return Dtype.float16 if self.kv_cache_dtype is Dtype.auto else self.kv_cache_dtype

    @property
    def converts(self) -> bool:
        return self.conversion is not Conversion.none

    def supports(self, variant: Variant) -> Support:
        from hasten.model.config_json import from_huggingface
        from hasten.model.grid import grid_of

        missing = [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]
        if missing:
            return Support(reason=f'{missing[0]} is not installed: pip install "hasten[cpu-engines]"')
        if reason := gguf.unsupported(variant, self.max_context):
            return Support(reason=reason)
        width = from_huggingface(variant.config).head_width
        if self.kv_cache_dtype is Dtype.int8 and width % gguf.BLOCK:
            return Support(reason=f"a Q8_0 KV cache has a scale for every {gguf.BLOCK} values: the heads' width must "
                           f"be a multiple of it, got {width}")  # fmt: skip
        kind = gguf.format_name(grid_of(variant), self.weights)
        if self.converts:
            if variant.manifest.get("grid"):
                return Support(reason=f"engine.conversion={self.conversion.value} rounds floats, this lies on a grid")
            kind = self.conversion.value
        if self.activation_dtype not in (Dtype.auto, *(d for d, name in gguf.FLOATS.items() if name == kind)):
            theirs = self.weights.name if kind == gguf.FLOATS[self.weights] else "int8"
            return Support(reason=f"llama.cpp multiplies {kind} weights with {theirs} activations: activation_dtype "
                           f"must be auto, got {self.activation_dtype.name}")  # fmt: skip
        return Support(native_format=kind)

    def build(self, variant: Variant, cache: Path) -> Path:
        """The folder that holds `variant` as `model.gguf` and its facts; written once, then found again."""
        kind = self.conversion.name if self.converts else self.weights.name
        folder = cache / "llamacpp" / f"{variant.hash}-{kind}-{gguf.FORMAT}"

        def make(temporary: Path) -> None:
            encoder = Converter.of(variant, self.conversion) if self.converts else None
            facts = gguf.write(variant, self.weights, temporary / "model.gguf", text=False, encoder=encoder)
            write_json(temporary / "manifest.json", facts)

        return built(folder, make)

    def load(self, variant: Variant, cache: Path) -> LlamacppSession:
        support = self.supports(variant)
        if not support:
            raise UserError(f"llamacpp cannot run {variant.path.name}: {support.reason}")
        start = time.perf_counter()
        folder = self.build(variant, cache)
        build_seconds = time.perf_counter() - start
        session = LlamacppSession(self, folder)
        session.compile_seconds = build_seconds
        return session

    def describe(self) -> Json:
        own: Json = {"flash_attention": self.flash_attention.name, "micro_batch": self.micro_batch, "slots": self.slots}
        own["conversion"] = self.conversion.value
        resolved = {"weight_dtype": self.weights.name, "kv_cache_dtype": self.kv_cache.name}
        return {**super().describe(), **resolved, **own}


def arithmetic(kind: str, system: str) -> str:
    """What llama.cpp multiplies a GGUF type with, by the instructions of its build (`xllamacpp.get_system_info()`).

    Integers meet 8-bit activations; 16-bit floats are widened to float32 unless the build multiplies them directly.
    """
    if kind not in gguf.FLOATS.values():
        return "int8"
    direct = {"F16": ("float16", "FP16_VA = 1"), "BF16": ("bfloat16", "AVX512_BF16 = 1")}
    name, instruction = direct.get(kind, ("float32", ""))
    return name if instruction in system else "float32"


class LlamacppSession(Session):
    """A running server. `submit` may be called from several threads; `slots` requests run at a time."""

    def __init__(self, engine: Llamacpp, folder: Path) -> None:
        """Load `folder`/model.gguf. Raises `UserError` if llama.cpp refuses it."""
        import xllamacpp

        self.facts = read_json(folder / "manifest.json")
        self.context = min(engine.max_context, int(self.facts["context"]))
        system = str(xllamacpp.get_system_info())
        self.kernel = f"{self.facts['format']} ({next(iter(instructions(system)), 'scalar')})"
        self.weight_bytes_per_token = int(self.facts["weight_bytes_per_token"])
        cells = _whole_steps(self.context)
        kv_bytes = CACHE_BYTES[engine.kv_cache]
        self.kv_bytes_per_position = int(self.facts["kv_values_per_token"] * kv_bytes)
        # A sliding layer keeps its window and what one computation adds to it.
        near = min(cells, _whole_steps(int(self.facts["sliding_window"]) + engine.micro_batch))
        sliding_bytes = int(self.facts["sliding_values_per_token"] * kv_bytes)
        per_slot = (self.kv_bytes_per_position - sliding_bytes) * cells + sliding_bytes * near
        self._kv_cache_bytes = engine.slots * per_slot
        self.arithmetic = arithmetic(self.facts["format"], system)
        parameters = _parameters(engine, folder / "model.gguf", engine.slots * cells)
        start = time.perf_counter()
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise UserError(
                f"llama.cpp cannot load {folder}/model.gguf, delete the folder to rebuild it: {error}"
            ) from None
        self._first_token()
        self.load_seconds = time.perf_counter() - start
        self._workers = ThreadPoolExecutor(engine.slots, thread_name_prefix="llamacpp")
        self._flights: set[LlamacppFlight] = set()

    def _first_token(self) -> None:
        """Ask for one token: a server that is stopped before its loop has begun never stops.

        Raises `RuntimeError` if its probability is not a number; llama.cpp itself would go on with id 0.
        """
        chunks: list[bytes] = []
        self._server.handle_completions(_body(Request(0, (0, 1), 1, verify=True)), chunks.append)
        answers = [json.loads(chunk) for chunk in chunks]
        found = [choice["logprobs"] for answer in answers for choice in answer.get("choices", []) if choice["logprobs"]]
        if not found or found[0]["content"][0]["logprob"] is None:
            self._server = None
            raise RuntimeError(f"the logits are not finite: llama.cpp answered {answers[:1]}")

    def submit(self, request: Request) -> Stream:
        """Send `request`; tokens arrive on the stream that is returned.

        Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds.
        """
        if self._server is None:
            raise RuntimeError("the session is closed")
        request.check(self.context, int(self.facts["vocab_size"]))
        flight = LlamacppFlight(request)
        self._flights.add(flight)
        self._workers.submit(self._run, flight, _body(request))
        return Stream(flight)

    def _run(self, flight: LlamacppFlight, body: bytes) -> None:
        try:
            if not flight.cancelled:
                self._server.handle_completions(body, flight.receive)
        except Exception as error:  # whatever the wheel raises goes to the reader, who is on another thread
            flight.error = f"llama.cpp failed: {error}"
        finally:
            self._flights.discard(flight)
            flight.finished.set()

    def memory(self) -> dict[str, int | None]:
        return {"weights": int(self.facts["weight_bytes"]), "kv_cache": self._kv_cache_bytes}

    def close(self) -> None:
        for flight in list(self._flights):
            flight.cancelled = True
        self._workers.shutdown(wait=True)
        self._server = None  # the last reference: its destructor stops the server and frees the model


class LlamacppFlight(Flight):
    """A request on the server, which calls back with each piece of its answer."""

    def receive(self, chunk: bytes) -> bool:
        """The server's callback, on the worker's thread. True ends the request."""
        seconds = time.perf_counter() - self.sent
        answer = json.loads(chunk)
        if "choices" not in answer:
            self.error = f"llama.cpp refused request {self.request.id}: {answer.get('error', answer)}"
            return True
        choice = answer["choices"][0]
        ids = [int(id_) for id_ in choice["text"].split()]
        if self.request.verify and _doubtful(choice["logprobs"], len(ids)):
            self.error = f"request {self.request.id}: the logits are not finite after {self.count} tokens"
            return True
        for id_ in ids:
            self.arrived(id_, seconds)
        if choice["finish_reason"] and self.count < self.request.max_tokens and not self.cancelled:
            missing = f"after {self.count} of {self.request.max_tokens} tokens"
            self.error = f"llama.cpp ended request {self.request.id} {missing}"
        return self.cancelled


def _whole_steps(tokens: int) -> int:
    """How many tokens llama.cpp makes room for, to hold so many."""
    return -(-tokens // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE


def _doubtful(logprobs: Json | None, count: int) -> bool:
    """Whether one of `count` tokens came without a probability that is a number: llama.cpp then goes on with id 0."""
    content = logprobs["content"] if logprobs else []
    return len(content) != count or any(entry["logprob"] is None for entry in content)


def _body(request: Request) -> bytes:
    """The request as the server reads it: nothing cached, probabilities only to verify."""
    greedy = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"]}
    drawn = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0, "seed": request.seed,
             "samplers": ["temperature", "top_p"]}  # fmt: skip
    return json.dumps(
        {
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            **(drawn if request.temperature else greedy),
            "cache_prompt": False,
            "stream": True,
            **({"logprobs": 1} if request.verify else {}),
        }
    ).encode()


def _parameters(engine: Llamacpp, path: Path, cells: int) -> xllamacpp.CommonParams:
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = str(path)
    p.model_alias = {"hasten"}
    p.n_ctx = cells
    p.n_parallel = engine.slots
    p.n_batch = LARGEST_MICRO_BATCH
    p.n_ubatch = engine.micro_batch
    p.cpuparams.n_threads = engine.thread_count
    p.cpuparams_batch.n_threads = engine.thread_count
    kinds = xllamacpp.ggml_type
    types = {
        Dtype.float32: kinds.GGML_TYPE_F32,
        Dtype.float16: kinds.GGML_TYPE_F16,
        Dtype.bfloat16: kinds.GGML_TYPE_BF16,
        Dtype.int8: kinds.GGML_TYPE_Q8_0,
    }
    p.cache_type_k = p.cache_type_v = types[engine.kv_cache]
    p.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{engine.flash_attention.name.upper()}"
    )
    p.load_mode = (
        xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    )  # read, do not map: no page faults in the first request
    p.warmup = False
    p.fit_params = False
    p.cache_prompt = False
    p.cache_ram_mib = 0
    p.verbosity = 0
    p.hostnames = ["127.0.0.1"]
    p.port = 0
    p.api_keys = [secrets.token_urlsafe(32)]
    p.n_threads_http = 1
    p.ui = False
    p.endpoint_slots = False
    return p
