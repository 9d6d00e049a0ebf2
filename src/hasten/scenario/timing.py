"""Timing one request: what a user waits for, in seconds.

TTFT runs from the moment the request was sent until its first token arrived, queueing included;
latency until its last one; TPOT is what each further token costs: (latency - TTFT) / (tokens - 1),
the definitions of MLPerf Inference (https://docs.mlcommons.org/inference). Engines stamp tokens as
they arrive; the client's own clock checks those stamps, because an engine that leaves part of the
wait out would win unfairly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.engine.base import Request, Session

CLOCK_TOLERANCE = 0.05
"""Share of the latency by which an engine's stamps may fall short of the client's clock (median)."""
CLOCK_SLACK_SECONDS = 0.005
"""What a busy machine may put between a token's arrival and its reader, however short the latency."""


@dataclass(frozen=True)
class Sample:
    """One request as it was served. client_seconds: its latency by the client's own clock.

    guessed, accepted: tokens that the engine guessed for it, and those that were right; None where nothing guesses.
    """

    ttft_seconds: float
    tpot_seconds: float
    latency_seconds: float
    prompt_tokens: int
    output_tokens: int
    client_seconds: float
    guessed: int | None = None
    accepted: int | None = None


def timed(session: Session, request: Request) -> Sample:
    """Send a request of fixed length (no stop ids, at least 2 tokens) and time it, while the engine has no other.

    Raises `RuntimeError` if the engine answers another request, gives too few or too many tokens, or
    stamps them at times that cannot be.
    """
    stamps: list[float] = []
    client_seconds = 0.0
    before = session.guessed()
    start = time.perf_counter()
    for token in session.submit(request):
        client_seconds = time.perf_counter() - start
        stamps.append(token.seconds)
        if token.request != request.id:
            raise RuntimeError(f"the engine answered request {token.request} when request {request.id} was asked")
        if len(stamps) > request.max_tokens:
            break
    count = len(stamps)
    if count != request.max_tokens:
        given = "more" if count > request.max_tokens else str(count)
        raise RuntimeError(f"the engine gave {given} tokens where exactly {request.max_tokens} were asked for")
    if stamps[0] <= 0 or stamps != sorted(stamps):
        raise RuntimeError("the engine's time stamps run backwards or start before the request was sent")
    if stamps[-1] == stamps[0]:
        raise RuntimeError("the engine delivered all tokens at once; it must stream them to be timed")
    if stamps[-1] > client_seconds + CLOCK_SLACK_SECONDS:
        raise RuntimeError("the engine stamped a token later than it was received")
    after = session.guessed()
    guesses = None if before is None or after is None else (after[0] - before[0], after[1] - before[1])
    return Sample(
        ttft_seconds=stamps[0],
        tpot_seconds=(stamps[-1] - stamps[0]) / (count - 1),
        latency_seconds=stamps[-1],
        prompt_tokens=len(request.prompt),
        output_tokens=count,
        client_seconds=client_seconds,
        guessed=guesses and guesses[0],
        accepted=guesses and guesses[1],
    )


def check_clock(samples: Sequence[Sample]) -> None:
    """Raise `RuntimeError` if the engine's stamps leave out part of what the client waited for."""
    missing = statistics.median(sample.client_seconds - sample.latency_seconds for sample in samples)
    latency = statistics.median(sample.latency_seconds for sample in samples)
    if missing > max(CLOCK_TOLERANCE * latency, CLOCK_SLACK_SECONDS):
        raise RuntimeError(
            f"the engine's time stamps leave out {missing:.4f} s of a median latency of {latency:.4f} s "
            "that the client waited for"
        )
