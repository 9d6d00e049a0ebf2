"""What an engine is: something that loads a variant and turns token ids into token ids.

An engine is its options (a config) and, once it has loaded a variant, a session. Token ids go in
and come out, so every engine is asked exactly the same question. An engine that cannot run a
variant's grid natively says so (`supports`) and never simulates silently.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from hasten.artifacts import Variant, replacing
from hasten.errors import UserError
from hasten.hardware import cpu_count, libraries


class Dtype(Enum):
    """Number formats by their usual names. `auto` is the engine's fastest sound choice, and is recorded."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Parallel(Enum):
    """How a model is spread over devices."""

    none = "none"
    tensor = "tensor"
    pipeline = "pipeline"
    data = "data"


def built(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, which `make` fills if it is not there yet: once, however many processes want it."""
    if not folder.is_dir():
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                with replacing(folder) as temporary:
                    temporary.mkdir()
                    make(temporary)
    return folder


@dataclass(frozen=True)
class Support:
    """Whether an engine runs a variant: in which format, or why not.

    native: the arithmetic reads the variant's own integers. A dequantised run is not native: it is a
    reference for quality and never competes on speed.
    """

    native_format: str | None = None
    reason: str | None = None
    native: bool = True

    def __bool__(self) -> bool:
        return self.native_format is not None


@dataclass(frozen=True)
class Request:
    """A prompt to continue: greedily, or with a temperature by drawing.

    prompt: token ids, at least one. max_tokens: the most tokens to generate. stop: generation ends
    after the first of these ids (it is yielded too); empty means exactly `max_tokens` are generated.
    temperature: 0 takes the most likely token; above it, tokens are drawn from softmax(logits / temperature), of which
    top_p below 1 leaves the nucleus (`hasten.engine.sampling`). The same seed draws the same tokens again, on the same
    engine and alone; engines draw differently from each other.
    verify: the engine raises `RuntimeError` if a logit that decided a token is not finite, also where looking costs
    time: for requests that are not timed.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    stop: frozenset[int] = frozenset()
    verify: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError(f"request {self.id}: the prompt must hold at least one token, got none")
        if self.max_tokens < 1:
            raise UserError(f"request {self.id}: max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"request {self.id}: temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"request {self.id}: top_p must be above 0, and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"request {self.id}: seed must be 0 to 2**32 - 1, got {self.seed}")

    def check(self, context: int, vocabulary: int) -> None:
        """Raises `UserError` for ids outside the vocabulary and for more tokens than the context holds."""
        if len(self.prompt) + self.max_tokens > context:
            raise UserError(
                f"request {self.id}: prompt ({len(self.prompt)}) and max_tokens ({self.max_tokens}) "
                f"must fit max_context ({context})"
            )
        if outside := [id_ for id_ in self.prompt if not 0 <= id_ < vocabulary]:
            raise UserError(f"request {self.id}: token ids must be 0 to {vocabulary - 1}, got {outside[0]}")


@dataclass(frozen=True)
class Token:
    """One generated token. seconds: from the moment its request was sent until the token arrived."""

    request: int
    id: int
    seconds: float


FLOAT8 = "there is no kernel here for float8 weights, which GPUs multiply (engine vllm)"


def is_float8(variant: Variant) -> bool:
    """Whether its matrices are 8-bit floats."""
    return bool((variant.manifest.get("grid") or {}).get("type") == "float")


class Session(ABC):
    """A variant loaded into an engine. Close it when done."""

    kernel: str
    """The number format and kernel that really run, for example `Q8_0 (AVX2)`."""
    weight_bytes_per_token: int
    """Weight bytes that decoding one token at batch 1 reads, where nothing is guessed."""
    weight_bytes_per_guess: int = 0
    """Weight bytes that a draft reads on top, for each of its guesses."""
    kv_bytes_per_position: int
    """Bytes of keys and values, of all layers, that one position of the context holds; decoding reads them again."""
    arithmetic: str
    """What the multiplications really use: `float32`, `float16`, `bfloat16` or `int8`."""
    load_seconds: float
    """Reading the weights until ready, without building or compiling."""
    compile_seconds: float = 0.0
    """Building or compiling what is loaded (cached between runs)."""

    @abstractmethod
    def submit(self, request: Request) -> Iterator[Token]:
        """Send one request; its tokens as they arrive. Closing the iterator cancels the request.

        Raises `UserError` if prompt + max_tokens exceed the context.
        """

    def generate(self, requests: Iterable[Request]) -> Iterator[Token]:
        """The tokens of every request, one request after another unless the engine can do better."""
        for request in requests:
            yield from self.submit(request)

    def memory(self) -> dict[str, int | None]:
        """Bytes the engine knows of (`weights`, `kv_cache`), null where it cannot tell."""
        return {"weights": None, "kv_cache": None}

    def guessed(self) -> tuple[int, int] | None:
        """Tokens that were guessed so far, to be checked together, and those that were right; None: nothing guesses."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Free the model."""


@dataclass
class Engine(ABC):
    """Options every engine has.

    threads: CPU threads, 0 means all cores this process may use. weight_dtype: storage of weights that the variant
    leaves in float. activation_dtype, kv_cache_dtype: precision of the arithmetic and of the KV cache.
    max_context: tokens of prompt and completion together. devices: `cpu` or `cuda:0` and so on.
    """

    threads: int = 0
    weight_dtype: Dtype = Dtype.float32
    activation_dtype: Dtype = Dtype.auto
    kv_cache_dtype: Dtype = Dtype.auto
    max_context: int = 512
    devices: list[str] = field(default_factory=lambda: ["cpu"])
    parallel: Parallel = Parallel.none

    batches: ClassVar[bool] = False
    """Whether requests that run at the same time share a pass over the weights."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose version decides this engine's speed."""
    parallels: ClassVar[tuple[Parallel, ...]] = (Parallel.none,)
    """The ways in which it spreads a model."""

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 4096:
            raise UserError(f"threads must be 0 (all cores) to 4096, got {self.threads}")
        if self.max_context < 2:
            raise UserError(f"max_context must be at least 2, got {self.max_context}")
        if self.parallel not in self.parallels:
            known = " or ".join(kind.name for kind in self.parallels)
            raise UserError(f"parallel must be {known} for engine {self.name}, got {self.parallel.name}")

    @classmethod
    def versions(cls) -> dict[str, str | None]:
        """What decides this engine's speed, by name, with its version; null for what is not there."""
        return libraries(cls.libraries)

    @property
    def name(self) -> str:
        """The engine's one name: its file, its YAML, its tag."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def thread_count(self) -> int:
        return self.threads or cpu_count()

    @abstractmethod
    def supports(self, variant: Variant) -> Support:
        """In which native format this engine runs `variant`, or why it cannot. Loads nothing."""

    def reads(self, variant: Variant) -> Support:
        """As `supports`, wherever the engine is installed."""
        return self.supports(variant)

    @abstractmethod
    def load(self, variant: Variant, cache: Path) -> Session:
        """Load `variant`. What must be built from it first is kept under `cache`, by the variant's hash."""

    def draft_of(self, variant: Variant) -> Variant | None:
        """The variant that guesses for `variant` what comes next; None without one. It need not exist."""
        return None

    def describe(self) -> dict[str, Any]:
        """The options as they will be used, for the record."""
        return {
            "engine": self.name,
            "threads": self.thread_count,
            "weight_dtype": self.weight_dtype.name,
            "activation_dtype": self.activation_dtype.name,
            "kv_cache_dtype": self.kv_cache_dtype.name,
            "max_context": self.max_context,
            "devices": list(self.devices),
            "parallel": self.parallel.name,
        }
