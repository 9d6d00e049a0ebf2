"""A request that one thread computes and another one reads.

The reader looks every 10 ms instead of being woken for each token: that alone would take a core from the engine
(measured on 2 cores, 2 threads: 7 to 10% of a 7M-parameter model's decode). Times are taken on arrival.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from hasten.engine.base import Request, Token

HAND_OVER_SECONDS = 0.01
"""How long tokens may wait for their reader."""


@dataclass(eq=False)
class Flight:
    """A request under way: what the worker's thread writes and the stream reads."""

    request: Request
    sent: float = field(default_factory=time.perf_counter)
    tokens: deque[Token] = field(default_factory=deque)
    finished: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False
    error: str | None = None
    count: int = 0

    def arrived(self, id_: int, seconds: float) -> None:
        """A token, so long after the request was sent. After one of its stops the request is over."""
        self.count += 1
        self.tokens.append(Token(self.request.id, id_, seconds))
        self.cancelled = self.cancelled or id_ in self.request.stop


class Stream(Iterator[Token]):
    """The tokens of one request. `close` cancels it; so does dropping the stream."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def __next__(self) -> Token:
        flight = self._flight
        while not flight.tokens:
            if flight.finished.wait(HAND_OVER_SECONDS) and not flight.tokens:
                if flight.error is not None:
                    raise RuntimeError(flight.error)
                raise StopIteration
        return flight.tokens.popleft()

    def close(self) -> None:
        """Cancel the request and wait until the engine has let go of it."""
        self._flight.cancelled = True
        self._flight.finished.wait()
        self._flight.tokens.clear()

    def __del__(self) -> None:
        self._flight.cancelled = True
