"""hasten's own kernels: a decoder in C++ that reads a variant's integers as they are, as fast as memory gives them.

At batch 1 a token costs one reading of the weights, so what counts is bytes per weight and how close the reading comes
to the machine's bandwidth. The kernels (`cpp/kernels.hpp`) are compiled for the processor at hand; weights lie in the
order in which they are read, on huge pages; a group of 4-bit integers is multiplied with activations that are rounded
to 8 bits with a scale for every 32, four products per lane and instruction where there is VNNI. Several requests share
one pass (continuous batching), prompts fill it up, and no Python runs between tokens.

A pass over a few tokens costs hardly more than one over a single token, so what comes next may be guessed and checked
in it (speculative decoding): by what followed the last few tokens before, or by a draft, a smaller variant that writes
ahead.

    python pipelines/evaluate.py engine=native variant=int4 engine.slots=8
    python pipelines/evaluate.py engine=native variant=int4 engine.draft=healed-int4 engine.guesses=3

Built once per variant into `<cache>/native/<variant hash>-<weight_dtype>-<format>`.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Json, Variant, digest, write_json
from hasten.engine.base import Dtype, Engine, Request, Session, Support, Token, built
from hasten.engine.grids import apart, every
from hasten.engine.native import build as kernels
from hasten.engine.streaming import HAND_OVER_SECONDS
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.engine.native.loaded import Loaded
    from hasten.model.grid import Grid

RUNNING, FINISHED, _CANCELLED, NOT_FINITE = range(1, 5)  # `Status` of cpp/server.cpp
ALIGNED = 64
POLLED = 256


@dataclass
class Native(Engine):
    """weight_dtype auto is bfloat16, kv_cache_dtype auto is float16; int8 is multiplied as it is, whatever
    activation_dtype says.

    activation_dtype: auto rounds to 8 bits before a product with integers and to bfloat16 before one with bfloat16;
    float32 rounds nothing, for comparing answers. micro_batch: tokens of one pass. slots: requests that run at the same
    time, each with a context of max_context. guesses: tokens that are guessed and computed together with the next one;
    the answers stay the same to the token, greedy or drawn. draft: the variant beside the one that runs that guesses
    them; empty: they are what followed the last few tokens before.
    """

    micro_batch: int = 256
    slots: int = 1
    guesses: int = 0
    draft: str = ""

    batches: ClassVar[bool] = True
    int8_cache: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices != ["cpu"]:
            raise UserError(f"engine.devices must be [cpu] for native, got {self.devices}")
        if self.weight_dtype is Dtype.float16:
            raise UserError("engine.weight_dtype must be auto, bfloat16 or float32 for native, got float16")
        if self.activation_dtype not in (Dtype.auto, Dtype.float32):
            raise UserError(
                f"engine.activation_dtype must be auto or float32 for native, got {self.activation_dtype.name}"
            )
        if self.kv_cache_dtype is Dtype.bfloat16:
            raise UserError("engine.kv_cache_dtype must be auto, float16, float32 or int8 for native, got bfloat16")
        if not 1 <= self.slots <= 256:
            raise UserError(f"engine.slots must be 1 to 256, got {self.slots}")
        if not self.slots <= self.micro_batch <= 4096:
            raise UserError(f"engine.micro_batch must be slots ({self.slots}) to 4096, got {self.micro_batch}")
        if not 0 <= self.guesses < self.micro_batch:
            raise UserError(f"engine.guesses must be 0 to micro_batch - 1 ({self.micro_batch - 1}), got {self.guesses}")
        if self.draft and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.draft):
            raise UserError(
                f"engine.draft must be empty or a variant's name (letters, digits, -, _), got {self.draft!r}"
            )
        if self.draft and not self.guesses:
            raise UserError("engine.guesses must be at least 1 with engine.draft, got 0")

    @property
    def weights(self) -> Dtype:
        """The type of float weights with `auto` resolved."""
        return Dtype.bfloat16 if self.weight_dtype is Dtype.auto else self.weight_dtype

    @property
    def kv_cache(self) -> Dtype:
        """The KV cache's type with `auto` resolved."""
        return Dtype.float16 if self.kv_cache_dtype is Dtype.auto else self.kv_cache_dtype

    @classmethod
    def versions(cls) -> dict[str, str | None]:
        command = kernels.compiler()
        try:
            return {"compiler": kernels.version(tuple(command)).splitlines()[0] if command else None}
        except UserError:  # CXX names none: to be told to who loads this engine
            return {"compiler": None}

    def draft_of(self, variant: Variant) -> Variant | None:
        return Variant(variant.path.with_name(self.draft)) if self.draft else None

    def supports(self, variant: Variant) -> Support:
        support, draft = self._supports(variant), self.draft_of(variant)
        reason = self._misfit(draft, variant) if support and draft else None
        return Support(reason=reason) if reason else support

    def _supports(self, variant: Variant) -> Support:
        from hasten.model.config_json import from_huggingface
        from hasten.model.grid import grid_of

        if kernels.compiler() is None:
            return Support(reason="engine native needs a C++ compiler (g++ or clang++, or the one that CXX names)")
        try:
            from_huggingface(variant.config)
            grid = grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        if grid is None:
            return Support(native_format=self.weights.name)
        if reason := apart(grid):
            return Support(reason=reason)
        return every(grid, self._supports_grid)

    def _supports_grid(self, grid: Grid) -> Support:
        if grid.group_size % 32:
            return Support(reason=f"group_size must be 0 or a multiple of 32, got {grid.group_size}")
        return Support(native_format=grid.words)

    def _misfit(self, draft: Variant, variant: Variant) -> str | None:
        """Why a draft cannot guess for a variant that the engine runs; None if it can."""
        from hasten.model.config_json import from_huggingface

        if not (draft.path / "config.json").is_file():
            return f"engine.draft must name a variant beside {variant.path.name}, got {self.draft!r}"
        support = self._supports(draft)
        if not support:
            return f"engine.draft must name a variant that native runs, got {self.draft!r}: {support.reason}"
        ours, theirs = from_huggingface(variant.config), from_huggingface(draft.config)
        if ours.vocab_size != theirs.vocab_size:
            return (
                f"engine.draft must have a vocabulary of {ours.vocab_size}, got {self.draft!r} with {theirs.vocab_size}"
            )
        files = [one.path / "tokenizer.json" for one in (variant, draft)]
        if len({digest(file) if file.is_file() else "" for file in files}) > 1:
            return f"engine.draft must have the tokenizer of {variant.path.name}, got {self.draft!r} with another"
        context = min(self.max_context, ours.context)
        if theirs.context < context:
            return f"engine.draft must hold {context} tokens, got {self.draft!r} with a context of {theirs.context}"
        return None

    def build(self, variant: Variant, cache: Path) -> Path:
        """The folder that holds the packed weights and their facts; written once, then found again."""
        from hasten.engine.native.layout import FORMAT

        folder = cache / "native" / f"{variant.hash}-{self.weights.name}-{FORMAT}"
        return built(folder, lambda temporary: pack(variant, self.weights, temporary))

    def load(self, variant: Variant, cache: Path) -> NativeSession:
        from hasten.engine.native.loaded import Loaded

        support = self.supports(variant)
        if not support:
            raise UserError(f"native cannot run {variant.path.name}: {support.reason}")
        start = time.perf_counter()
        functions, draft = kernels.load(cache), self.draft_of(variant)
        folders = [self.build(one, cache) for one in (variant, draft) if one]
        ready = time.perf_counter()
        loaded = Loaded(self, variant, folders[0], self.guesses)
        ahead = Loaded(self, draft, folders[1]) if draft else None
        session = NativeSession(self, functions, str(support.native_format), loaded, ahead)
        session.compile_seconds, session.load_seconds = ready - start, time.perf_counter() - ready
        return session

    def describe(self) -> Json:
        resolved = {"weight_dtype": self.weights.name, "kv_cache_dtype": self.kv_cache.name}
        return {**super().describe(), **resolved, "micro_batch": self.micro_batch, "slots": self.slots,
                "guesses": self.guesses, "draft": self.draft}  # fmt: skip


def pack(variant: Variant, dtype: Dtype, folder: Path) -> None:
    """Write the weights as the kernels want them: `weights.bin` and where in it what lies."""
    import torch

    from hasten.engine.native.layout import Packed, Packer, packed_tensors
    from hasten.model.config_json import from_huggingface
    from hasten.model.grid import grid_of
    from hasten.model.huggingface import checked_tensors

    packer = Packer(checked_tensors(variant), grid_of(variant), getattr(torch, dtype.name))
    places: dict[str, Json] = {}
    with (folder / "weights.bin").open("wb") as file:

        def write(values: Tensor) -> int:
            file.write(b"\0" * (-file.tell() % ALIGNED))
            place = file.tell()
            file.write(values.contiguous().view(torch.uint8).numpy().data)
            return place

        for name, found in packed_tensors(packer, from_huggingface(variant.config)).items():
            if isinstance(found, Packed):
                places[name] = {part: getattr(found, part) for part in ("kind", "rows", "columns", "group")}
                for part in ("data", "scales", "bias"):
                    values = getattr(found, part)
                    places[name][part] = write(values) if len(values) else None
                places[name]["bytes"] = found.data.nbytes + found.scales.nbytes
            else:
                places[name] = {"data": write(found)}
    write_json(folder / "manifest.json", {"schema": 1, "kind": "native", "places": places})


class NativeSession(Session):
    """A running server. `submit` may be called from several threads.

    weight_bytes_per_token: of one pass of the variant itself, which also gives each guess in it that is right. What its
    draft reads for every guess comes on top and is not part of it: `weight_bytes_per_guess`.
    """

    def __init__(
        self, engine: Native, functions: Any, native_format: str, loaded: Loaded, draft: Loaded | None
    ) -> None:
        self.config, self.context, self.functions = loaded.config, loaded.context, functions
        self._loaded = [one for one in (loaded, draft) if one]
        self._server = functions.hasten_open(*(ctypes.byref(one.shape) for one in self._loaded), *[None] * (not draft))
        self._gate, self._inside = threading.Condition(), 0  # threads that are in the server
        if not self._server:
            raise MemoryError(f"native could not reserve a KV cache for {engine.slots} x {self.context} tokens")
        self.kernel = f"{native_format} ({functions.hasten_kernels().decode()})"
        self.weight_bytes_per_token = loaded.weight_bytes_per_token
        self.weight_bytes_per_guess = draft.weight_bytes_per_token if draft else 0
        self.kv_bytes_per_position = loaded.kv_bytes_per_position
        self.arithmetic = arithmetic(engine, native_format, self.kernel)

    def submit(self, request: Request) -> Stream:
        """Send `request`; tokens arrive on the stream that is returned.

        Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds.
        """
        request.check(self.context, self.config.vocab_size)
        prompt, stops = ((ctypes.c_int32 * len(ids))(*ids) for ids in (request.prompt, request.stop))
        sampling = (request.temperature, request.top_p, request.seed)
        arguments = (prompt, len(prompt), request.max_tokens, stops, len(stops), *sampling)
        handle = self.call("submit", *arguments)
        if handle is None:
            raise RuntimeError("the session is closed")
        return Stream(self, request, handle)

    def call(self, name: str, *arguments: Any) -> Any:
        """A function of the server, which does nothing once the session is closed. Any thread may call."""
        with self._gate:
            if not self._server:
                return None
            server, self._inside = self._server, self._inside + 1
        try:
            return getattr(self.functions, f"hasten_{name}")(server, *arguments)
        finally:
            with self._gate:
                self._inside -= 1
                self._gate.notify_all()

    def memory(self) -> dict[str, int | None]:
        """Of the variant and its draft."""
        return {"weights": sum(one.weight_bytes for one in self._loaded), "kv_cache": self.call("cache_bytes")}

    def guessed(self) -> tuple[int, int]:
        guessed, right = ctypes.c_int64(), ctypes.c_int64()
        self.call("guesses", ctypes.byref(guessed), ctypes.byref(right))
        return guessed.value, right.value

    def close(self) -> None:
        with self._gate:
            server, self._server = self._server, None
            self._gate.wait_for(lambda: not self._inside)  # nobody waits there for long
        if server:
            self.functions.hasten_close(server)


class Stream(Iterator[Token]):
    """The tokens of one request. `close` cancels it; so does dropping the stream."""

    def __init__(self, session: NativeSession, request: Request, handle: int) -> None:
        self._session, self._request, self._handle = session, request, handle
        self._ready: deque[Token] = deque()
        self._seen, self._status = 0, RUNNING
        self._ids, self._seconds = (ctypes.c_int32 * POLLED)(), (ctypes.c_double * POLLED)()

    def __next__(self) -> Token:
        while not self._ready:
            if self._status >= FINISHED:
                self.close()
                if self._status == NOT_FINITE:
                    raise RuntimeError(
                        f"request {self._request.id}: the logits are not finite after {self._seen} tokens"
                    )
                raise StopIteration
            self._poll()
            if not self._ready and self._status < FINISHED:
                self._session.call("wait", self._handle, HAND_OVER_SECONDS)
        return self._ready.popleft()

    def _poll(self) -> None:
        status = ctypes.c_int32(FINISHED)
        arguments = (self._handle, self._seen, POLLED, self._ids, self._seconds, ctypes.byref(status))
        count = self._session.call("poll", *arguments) or 0
        self._ready.extend(Token(self._request.id, self._ids[i], self._seconds[i]) for i in range(count))
        self._seen, self._status = self._seen + count, status.value

    def close(self) -> None:
        """Cancel the request and wait until the engine has let go of it."""
        handle, self._handle = self._handle, 0
        if not handle:
            return
        self._session.call("cancel", handle)
        self._session.call("wait", handle, 60.0)
        self._session.call("forget", handle)
        self._ready.clear()
        self._status = max(self._status, FINISHED)

    def __del__(self) -> None:
        if self._handle:
            self._session.call("forget", self._handle)


def arithmetic(engine: Native, native_format: str, kernel: str) -> str:
    """What most multiplications really use."""
    if engine.activation_dtype is Dtype.float32:
        return "float32"
    if native_format.startswith("int"):
        return "int8"
    return "bfloat16" if native_format == "bfloat16" and "BF16" in kernel else "float32"
