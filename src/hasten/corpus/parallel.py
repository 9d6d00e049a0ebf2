"""Map a function over chunks in several processes: in order, with bounded memory, same result for any count."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

_function: Callable[[Any], Any]


def ordered_map(function: Callable[[In], Out], chunks: Iterable[In], workers: int) -> Iterator[Out]:
    """`map(function, chunks)` in `workers` processes; with one worker, in this one.

    At most three chunks per worker are in flight, so `chunks` may be longer than memory. `function`
    is sent once to each worker and may therefore carry large tables.
    """
    if workers <= 1:
        yield from map(function, chunks)
        return
    # Spawned, not forked: the tokenizers library has threads, and a forked child could inherit their locks.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(function,))
    waiting: deque[Future[Out]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_call, chunk))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent: a pool's workers would otherwise wait for ever once it was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(chunk: Any) -> Any:
    return _function(chunk)
