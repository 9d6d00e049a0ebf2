"""An engine, a task and a tokenizer in memory, for tests of whatever uses one.

`FakeEngine(mode=...)` also plays the ways in which an engine can fail; a trial runs it in a process
of its own, so it is importable there and its state is its options.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.artifacts import Variant, replacing, write_json
from hasten.engine.base import Engine, Request, Session, Support, Token
from hasten.task.base import Item, Task

EOS = 1
VOCABULARY = 50

Reply = Callable[[Request], list[int]]


def count_up(request: Request) -> list[int]:
    """Exactly `max_tokens` ids without stop ids; with stop ids, one token and then the first of them."""
    first = 3 + request.prompt[-1] % 40
    return [first, min(request.stop)] if request.stop else [first] * request.max_tokens


def hold(request: Request | None = None) -> list[int]:
    """Takes 1 GiB, and keeps it until somebody comes."""
    held = [bytearray(b"x" * 2**24) for _ in range(64)]
    time.sleep(600)
    return [len(held)]


@dataclass
class FakeSession(Session):
    """Streams `reply(request)` in real time. requests: what it was asked, in order."""

    reply: Reply = count_up
    token_seconds: float = 0.0
    kernel: str = "fake"
    weight_bytes_per_token: int = 1000
    load_seconds: float = 0.01
    compile_seconds: float = 0.0
    arithmetic: str = "float32"
    kv_bytes_per_position: int = 100
    requests: list[Request] = field(default_factory=list)
    closed: bool = False

    def submit(self, request: Request) -> Iterator[Token]:
        self.requests.append(request)
        start = time.perf_counter()
        for token_id in self.reply(request):
            time.sleep(self.token_seconds)
            yield Token(request.id, token_id, time.perf_counter() - start)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeEngine(Engine):
    """mode: ok, or a name in `load` below, or refuse: what the engine does when it is asked to load."""

    mode: str = "ok"
    token_seconds: float = 0.0002

    def supports(self, variant: Variant) -> Support:
        return Support(reason="no such grid") if self.mode == "refuse" else Support("fake32")

    def load(self, variant: Variant, cache: Path) -> Session:
        session = FakeSession(token_seconds=self.token_seconds)
        match self.mode:
            case "build":
                built = cache / "built"
                cache.mkdir(parents=True, exist_ok=True)
                session.compile_seconds = 0.1 if built.exists() else 1.5
                session.kernel = f"process {os.getpid()}"
                with built.open("a") as file:
                    file.write(f"{os.getpid()}\n")
            case "threads":
                session.kernel = f"{os.environ['OMP_NUM_THREADS']} {os.environ['MKL_NUM_THREADS']}"
            case "raise":
                raise FloatingPointError("logits are not finite\nat step 3")
            case "user_error":
                from hasten.errors import UserError

                raise UserError("model.safetensors is not a readable safetensors file")
            case "exit":
                os._exit(7)
            case "crash":
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang" | "hang_with_lock" | "hang_with_child":
                pids = [os.getpid()]
                if self.mode == "hang_with_child":
                    pids.append(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
                    pids.append(subprocess.Popen(["sleep", "600"]).pid)
                (cache / "pid").write_text(" ".join(map(str, pids)))
                # ctypes.PyDLL keeps Python's lock: no other thread of that process runs any more.
                ctypes.PyDLL(None).sleep(600) if self.mode == "hang_with_lock" else time.sleep(600)
            case "hang_in_request":
                session.reply = lambda request: time.sleep(600) or []
            case "allocate":
                hold()
            case "allocate_in_request":
                session.reply = hold
            case "exit_in_request":
                session.reply = lambda request: os._exit(7)
            case "chatter":
                for stream in (1, 2):
                    os.write(stream, b'{"outcome": "mine"' * 10_000)
                assert os.read(0, 1) == b"", "an engine must not read the commands"
            case "huge":
                session.memory = lambda: {f"part {i}": i for i in range(200_000)}  # type: ignore[method-assign]
            case "full_disk":
                with replacing(cache / "built") as temporary:
                    temporary.mkdir()
                    (temporary / "half").write_text("half")
                    with Path("/dev/full").open("wb") as full:
                        full.write(b"x" * 2**16)
            case "crash_on_close":
                session.close = lambda: os._exit(9)  # type: ignore[method-assign]
            case "wrong_ids":
                session.reply = lambda request: [VOCABULARY + 7] * request.max_tokens
            case "short":
                session.reply = lambda request: [5] * (request.max_tokens - 1)
        return session


@dataclass
class ExactTask(Task):
    """Items are given; scored by exact match."""

    def items(self, split: str) -> Iterator[Item]:
        return iter(())


@dataclass
class FakeTaskData:
    """What `hasten.task.data.TaskData` offers, from memory."""

    path: Path
    items_by_split: dict[str, list[Item]]
    manifest: dict[str, Any] = field(default_factory=lambda: {"max_output_tokens": 2, "language": "en"})
    task: Task = field(default_factory=ExactTask)

    def items(self, split: str) -> list[Item]:
        return self.items_by_split[split]


class FakeTokenizer:
    """One id per word: `w7` is 7. Ids below 3 are special."""

    bos_id, eos_id, pad_id, vocab_size = 0, EOS, 2, VOCABULARY

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        return (self.bos_id, *(int(word[1:]) for word in text.split()))

    def completion_ids(self, text: str) -> tuple[int, ...]:
        return (*(int(word[1:]) for word in text.split()), self.eos_id)

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids if i > 2)


def write_variant(path: Path, **manifest: Any) -> Path:
    """A variant folder with nothing but what describes it."""
    write_json(path / "config.json", {"model_type": "llama", "vocab_size": VOCABULARY})
    facts = {
        "schema": 1,
        "kind": "variant",
        "name": path.name,
        "method": "identity",
        "lineage": [path.name],
        "grid": None,
    }
    write_json(path / "manifest.json", {**facts, **manifest})
    return path


def write_tokens(path: Path, ids: list[int]) -> Path:
    """A token folder with that validation split."""
    import numpy as np

    write_json(path / "manifest.json", {"schema": 1, "kind": "tokens", "dtype": "uint16", "languages": ["en"]})
    np.array(ids, dtype=np.uint16).tofile(path / "validation.bin")
    return path
