"""The processor and CUDA devices as things whose speed is measured: how fast they read, how fast they multiply.

Reading is a sum over int64 by threads pinned to their cores, each over its own slice of the working set,
again and again within one call: the slice is seen through a view (passes, elements) whose first stride is
0. Calls are long because threads of one interpreter wait for each other between calls: with calls of
4 MiB the same sum lost 15% at a working set of 4 MiB. Multiplying is `torch.mm` of square matrices.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import psutil

if TYPE_CHECKING:
    import torch

WORKING_SETS = tuple(2**power for power in range(18, 31))
"""Bytes read, by all threads together: 256 KiB to 1 GiB."""
CUDA_WORKING_SETS = tuple(2**power for power in range(20, 33))
MEMORY_SHARE = 0.25
"""How much of the free memory the largest working set may take."""
MATRICES, CUDA_MATRICES = (256, 512, 1024, 2048), (1024, 2048, 4096, 8192)
TURN_SECONDS = 0.04
CALL_BYTES = 2**28
"""How much one call reads: calls this long make Python's part in them, and the wait for its lock, nothing."""
QUIET_SHARE = 0.97
"""A turn is quiet if every thread had its core for at least this share of it."""


class Turn(NamedTuple):
    """One measurement. rate: bytes or FLOPs per second. share: of its core that the worst-off thread had."""

    rate: float
    share: float

    @property
    def quiet(self) -> bool:
        return self.share >= QUIET_SHARE


class Device(Protocol):
    """What is measured."""

    working_sets: tuple[int, ...]
    matrices: tuple[int, ...]

    def read(self, working_set: int) -> Turn: ...
    def multiply(self, dtype: str, size: int) -> float: ...


def available_bytes() -> int:
    """Memory that is free, here or in the container."""
    free = int(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def within(sizes: Sequence[int], free_bytes: float) -> tuple[int, ...]:
    """The working sets that fit into a share of the free memory; always the smallest."""
    return tuple(size for size in sizes if size <= MEMORY_SHARE * free_bytes) or (min(sizes),)


def pair_of(dtype: str, size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two square matrices to multiply."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    shape = (2, size, size)
    if dtype == "int8":
        pair = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator, device=device)
    else:
        pair = torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
    return pair[0], pair[1]


def product(dtype: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What multiplies them; integers are summed in int32."""
    import torch

    return torch._int_mm if dtype == "int8" else torch.mm


class Cpu:
    """The processor: `threads` threads, each pinned to a core and owner of a slice of the working set."""

    matrices: tuple[int, ...] = MATRICES

    def __init__(self, threads: int, cores: Sequence[int] | None = None) -> None:
        import torch

        self.threads = threads
        self.working_sets = within(WORKING_SETS, available_bytes())
        self.cores: list[int | None] = [None] * threads
        if hasattr(os, "sched_setaffinity"):
            allowed = sorted(cores if cores is not None else os.sched_getaffinity(0))[:threads]
            os.sched_setaffinity(0, allowed)
            self.cores = [allowed[i % len(allowed)] for i in range(threads)]
        torch.set_num_threads(threads)
        self._pairs: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._slices: list[torch.Tensor] = [torch.empty(0)] * threads
        self._each(self._fill)

    def read(self, working_set: int) -> Turn:
        """Sum the working set over and over for `TURN_SECONDS`."""
        gate = threading.Barrier(self.threads)
        turns: list[Turn | None] = [None] * self.threads

        def reader(index: int) -> None:
            part = self._slices[index][: max(1, working_set // self.threads // 8)]
            size = part.numel() * 8
            passes = max(1, CALL_BYTES // self.threads // size)
            again = part.expand(passes, -1)  # (passes, elements), the same memory every time
            part.expand(max(1, min(passes, 2**25 // size)), -1).sum(dim=1)  # into the cache, if it fits one
            gate.wait(TURN_SECONDS + 30)  # not for ever, should another thread have failed
            start, own, done = time.perf_counter(), time.thread_time(), 0
            while (elapsed := time.perf_counter() - start) < TURN_SECONDS:
                again.sum(dim=1)
                done += passes * size
            turns[index] = Turn(done / elapsed, (time.thread_time() - own) / elapsed)

        self._each(reader)
        finished = [turn for turn in turns if turn is not None]
        return Turn(sum(turn.rate for turn in finished), min(turn.share for turn in finished))

    def multiply(self, dtype: str, size: int) -> float:
        """FLOPs per second of one product of two matrices, with all threads."""
        import torch

        torch.set_num_threads(self.threads)
        if (dtype, size) not in self._pairs:
            self._pairs[dtype, size] = pair_of(dtype, size, "cpu")
        left, right = self._pairs[dtype, size]
        multiply = product(dtype)
        start = time.perf_counter()
        multiply(left, right)
        return 2 * size**3 / (time.perf_counter() - start)

    def _fill(self, index: int) -> None:
        """A slice that is in memory: pages that were never written all share one page of zeros.

        Its pages are those that engines get for their weights: private ones (Python's default is shared, which never
        gets large pages), with large ones where the system gives them to all, but none asked for in particular.
        """
        import torch

        page = 2**21
        size = max(8, max(self.working_sets) // self.threads)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size + page, **private)
        whole = torch.frombuffer(memory, dtype=torch.int8)
        start = -whole.data_ptr() % page
        self._slices[index] = whole[start : start + size // 8 * 8].view(torch.int64).fill_(1)

    def _each(self, work: Callable[[int], None]) -> None:
        """Run `work(index)` in every pinned thread. Raises what the first of them raised."""
        import torch

        errors: list[BaseException] = []

        def run(index: int) -> None:
            try:
                core = self.cores[index]
                if core is not None:
                    os.sched_setaffinity(threading.get_native_id(), {core})
                torch.set_num_threads(1)  # of this thread: it shares its work with no other
                work(index)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=run, args=(index,)) for index in range(self.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]


class Cuda:
    """A CUDA device. Its memory and its clocks are its own, so nothing says what share of it was had."""

    matrices: tuple[int, ...] = CUDA_MATRICES

    def __init__(self, device: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(f"{device} cannot be measured: torch finds no CUDA device")
        self.device = device
        self.working_sets = within(CUDA_WORKING_SETS, torch.cuda.mem_get_info(device)[0])
        self._memory = torch.ones(max(self.working_sets) // 8, dtype=torch.int64, device=device)
        self._pairs: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def read(self, working_set: int) -> Turn:
        part = self._memory[: working_set // 8]
        passes = max(1, 2**32 // working_set)
        again = part.expand(passes, -1)
        return Turn(passes * working_set / self._seconds(lambda: again.sum(dim=1)), 1.0)

    def multiply(self, dtype: str, size: int) -> float:
        if (dtype, size) not in self._pairs:
            self._pairs[dtype, size] = pair_of(dtype, size, self.device)
        left, right = self._pairs[dtype, size]
        multiply = product(dtype)
        return 2 * size**3 / self._seconds(lambda: multiply(left, right))

    def _seconds(self, work: Callable[[], Any]) -> float:
        """By the device's own clock, after one call that nobody times."""
        import torch

        work()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1000
