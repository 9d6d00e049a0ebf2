"""What does hasten add to an engine's own time? llama.cpp's timings of a request beside those that a trial reports.

    python benchmarks/wrapping.py                  # 110M parameters, half a minute
    python benchmarks/wrapping.py --shape 15m --format float32

llama.cpp's server says of every request how long it took to read the prompt and to write each further token. The same
requests as hasten sees them: the time until the first token, and per token after it. Printed is the median over
requests of hasten's time over the server's, with the middle half. Exits with 1 if decoding differs by more than 3%.

The other engines' loops are hasten's own (`native`) or run in its process token by token: there is no second clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from engines import DECODED, PREFILLED, SHAPES, Case, made, prompt
from rich.console import Console

from hasten.artifacts import Variant
from hasten.engine.base import Request, Session
from hasten.engine.llamacpp import LlamacppFlight
from hasten.hardware import cpu_count

REQUESTS, MOST = 20, 0.03


def listening() -> list[dict[str, Any]]:
    """What the server says of each request from now on."""
    heard: list[dict[str, Any]] = []
    plain = LlamacppFlight.receive

    def receive(self: LlamacppFlight, chunk: bytes) -> bool:
        answer = json.loads(chunk)
        if "timings" in answer:
            heard.append(answer["timings"])
        return plain(self, chunk)

    LlamacppFlight.receive = receive  # type: ignore[method-assign]
    return heard


def compared(session: Session, ids: tuple[int, ...], heard: list[dict[str, Any]]) -> tuple[float, float]:
    """Hasten's seconds over the server's: until the first token, and per token after it."""
    heard.clear()
    tokens = list(session.submit(Request(0, ids, DECODED)))
    theirs = heard[-1]
    each = (tokens[-1].seconds - tokens[0].seconds) / (DECODED - 1)
    return 1000 * tokens[0].seconds / theirs["prompt_ms"], 1000 * each / theirs["predicted_per_token_ms"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--threads", type=int, default=cpu_count())
    options = parser.parse_args()
    console, heard, config = Console(highlight=False, width=120), listening(), SHAPES[options.shape]
    case = Case("llamacpp", options.format, options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made(options.shape, folder)
        with closing(case.options().load(Variant(folder / case.variant), folder / "engines")) as session:
            ids = prompt(PREFILLED, config)
            compared(session, ids, heard)  # the first request warms up
            found = np.array([compared(session, ids, heard) for _ in range(REQUESTS)])  # (requests, 2)
    low, middle, high = np.quantile(found, [0.25, 0.5, 0.75], axis=0)
    for number, what in enumerate(("until the first token", "per further token")):
        console.print(f"{what}: {middle[number]:.3f} of the server's own time [{low[number]:.3f}, {high[number]:.3f}]")
    return 0 if abs(middle[1] - 1) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
