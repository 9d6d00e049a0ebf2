"""How far a trial is from what its machine could do, and what holds it back: the roofline.

A phase (decoding one token, or prefilling one prompt) has to read some bytes and to make some
multiplications. The machine needs at least bytes / bandwidth seconds for the first and FLOPs / rate for the
second (Williams, Waterman and Patterson 2009, https://doi.org/10.1145/1498765.1498785). Whichever is
longer is the limit, and its share of the measured time says how near the engine comes:

- MBU, model bandwidth utilisation, is the first share (Databricks 2023,
  https://www.databricks.com/blog/llm-inference-performance-engineering-best-practices):
  (weight bytes + KV bytes) read per token / seconds per token / measured bandwidth;
- MFU, model FLOPs utilisation, is the second (Chowdhery et al. 2022, arXiv:2204.02311):
  FLOPs that the model needs / seconds / measured rate.

A phase that neither explains to at least half is overhead-bound: calls, waiting threads, unpacking integers.
Ceilings come from `hasten.ceilings`; the bandwidth is that at the trial's own working set, because a
small model lives in the cache. Everything here is arithmetic on numbers that were measured before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from hasten.artifacts import Json
from hasten.ceilings import read_rate
from hasten.model.cost import NetworkCost, cost_of
from hasten.model.shape import Shape

EXPLAINS = 0.5
"""The share of the measured time from which on a limit counts as what binds."""
IMPOSSIBLE = 1.1
"""Above this share of a ceiling, the ceiling is wrong."""
NEEDED = ("ttft_seconds_p50", "tpot_seconds_p50")


@dataclass(frozen=True)
class Work:
    """What a loaded variant does for a token, as its session says.

    config: the model's shape, None for a family whose FLOPs are not counted. weight_bytes_per_token: read for every
    decoded token, where nothing is guessed. kv_bytes_per_position: bytes of keys and values per position of the
    context, all layers (0 for a recurrent state, which does not grow: its few bytes are left out). arithmetic: what the
    multiplications use: `float32`, `float16`, `bfloat16` or `int8`. weight_bytes_per_guess: read by a draft, on top.
    """

    config: Shape | None
    weight_bytes_per_token: int
    kv_bytes_per_position: int
    arithmetic: str
    weight_bytes_per_guess: int = 0

    @property
    def cost(self) -> NetworkCost | None:
        return cost_of(self.config) if self.config else None

    @property
    def prefill_weight_bytes(self) -> float:
        """What a prefill reads of the weights, in the session's format: an LSTM's encoder too, which no token reads."""
        cost = self.cost
        more = cost.prefill_weight_bytes() / cost.weight_bytes_per_token() if cost else 1
        return self.weight_bytes_per_token * more

    def kv_bytes(self, tokens: int) -> float:
        """The state that a prompt of that many tokens leaves."""
        cost = self.cost
        return cost.kv_bytes(tokens, self._element_bytes(cost)) if cost else self.kv_bytes_per_position * tokens

    def kv_bytes_read(self, positions: Iterable[int]) -> float:
        """What decoding a token reads of the state, on average over where it stands; sliding layers read a window."""
        cost = self.cost
        if cost is None:
            return self.kv_bytes_per_position * fmean(positions)
        element_bytes = self._element_bytes(cost)
        return fmean(cost.kv_bytes_read(position, element_bytes) for position in positions)

    def _element_bytes(self, cost: NetworkCost) -> float:
        """Bytes per element of the state, by what the session says one position takes."""
        return self.kv_bytes_per_position / cost.kv_bytes(1, 1)


def roofline(work: Work, speed: Json, ceilings: Json) -> Json:
    """What a measurement says about its limits, from `speed` ({scenario: figures}) and the machine's ceilings.

    Keys: `roofline` ({scenario: {decode, prefill, why}}, each phase as `phase` returns it), and of the first scenario
    `ceilings` (bytes and FLOPs per second, at the working set of a decoded token), `mbu` (decoding), `mfu` (prefill),
    `bound` (decoding); `why` has the reason for each that is null.
    """
    scenarios = {name: _scenario(work, entry, ceilings) for name, entry in speed.items()}
    first = next((entry for entry in scenarios.values() if "decode" in entry), None)
    if first is None:
        return nothing("no scenario timed single requests")
    decode, prefill = first["decode"], first["prefill"]
    reasons = {"mbu": decode["why"], "mfu": prefill["why"], "bound": decode["why"]}
    values = {"mbu": decode["mbu"], "mfu": prefill["mfu"], "bound": decode["bound"]}
    return {
        "ceilings": {
            "read_bytes_per_second": read_rate(ceilings, decode["working_set_bytes"]),
            "working_set_bytes": decode["working_set_bytes"],
            "cache_read_bytes_per_second": ceilings["cache_bytes_per_second"],
            "dram_read_bytes_per_second": ceilings["dram_bytes_per_second"],
            "matmul_flops_per_second": ceilings["matmul_flops_per_second"].get(work.arithmetic),
            "arithmetic": work.arithmetic,
            "validity": ceilings["validity"],
            "date": ceilings["date"],
        },
        **values,
        "roofline": scenarios,
        "why": {name: reasons[name] for name, value in values.items() if value is None},
    }


def nothing(why: str) -> Json:
    """The same keys for a trial whose limits are not known."""
    names = ("ceilings", "mbu", "mfu", "bound")
    return {**dict.fromkeys(names), "roofline": {}, "why": dict.fromkeys(names, why)}


def _scenario(work: Work, entry: Json, ceilings: Json) -> Json:
    lengths = [entry.get("options", {}).get(name) for name in ("prompt_tokens", "output_tokens")]
    lacking = [name for name in NEEDED if entry.get(name) is None]
    if lacking or None in lengths:
        return {"why": f"the scenario has no {lacking[0] if lacking else 'fixed lengths'}"}
    prompt, output = lengths
    guessing = {name: entry[name] for name in ("tokens_per_pass", "guesses_per_pass") if entry.get(name)}
    decode = decoding(work, prompt, output, entry["tpot_seconds_p50"], ceilings, **guessing)
    prefill = prefilling(work, prompt, entry["ttft_seconds_p50"], ceilings)
    return {"decode": decode, "prefill": prefill, "why": f"{decode['why']}. {_capital(prefill['why'])}."}


def decoding(
    work: Work,
    prompt_tokens: int,
    output_tokens: int,
    tpot_seconds: float,
    ceilings: Json,
    *,
    tokens_per_pass: float = 1.0,
    guesses_per_pass: float = 0.0,
) -> Json:
    """One decoded token, averaged over the tokens after the first of a request alone on the engine.

    Token k after the first (k = 1 .. output - 1) is the last of prompt + k positions: prompt + output / 2 on average.
    Tokens of one pass share what it reads, and what a draft has read for it.
    """
    positions = range(prompt_tokens + 1, prompt_tokens + max(output_tokens, 2))
    checked = work.weight_bytes_per_token + work.kv_bytes_read(positions)
    read = (checked + guesses_per_pass * work.weight_bytes_per_guess) / tokens_per_pass
    held = checked + work.weight_bytes_per_guess
    cost = work.cost
    flops = round(fmean(cost.decode_flops(position) for position in positions)) if cost else None
    return phase("decode", read, flops, tpot_seconds, work.arithmetic, ceilings, working_set_bytes=held)


def prefilling(work: Work, prompt_tokens: int, ttft_seconds: float, ceilings: Json) -> Json:
    """A whole prompt up to its first token: every weight read once for all its tokens, logits for the last alone."""
    read = work.prefill_weight_bytes + work.kv_bytes(prompt_tokens)
    cost = work.cost
    flops = cost.prefill_flops(prompt_tokens, logits=1) if cost else None
    return phase("prefill", read, flops, ttft_seconds, work.arithmetic, ceilings)


def phase(
    name: str,
    read_bytes: float,
    flops: int | None,
    measured_seconds: float,
    arithmetic: str,
    ceilings: Json,
    *,
    working_set_bytes: float | None = None,
) -> Json:
    """One phase against its two limits.

    bytes, flops: what it needs. working_set_bytes: what it reads over and over, the bytes unless told. memory_seconds,
    compute_seconds: the least that takes here. measured_seconds: what it took. mbu, mfu: the two shares. bound:
    `memory`, `compute`, `overhead`, or null if memory does not explain half of the time and arithmetic is not known.
    share: that of the nearer limit. why: the same as a sentence.
    """
    held = working_set_bytes or read_bytes
    bandwidth = read_rate(ceilings, held)
    rate = ceilings["matmul_flops_per_second"].get(arithmetic)
    memory = read_bytes / bandwidth
    compute = flops / rate if flops is not None and rate else None
    mbu, mfu = memory / measured_seconds, None if compute is None else compute / measured_seconds
    share = max(mbu, mfu or 0.0)
    if share >= EXPLAINS:
        bound: str | None = "memory" if mbu >= (mfu or 0.0) else "compute"
    else:
        bound = None if mfu is None else "overhead"
    reading = f"the {_giga(bandwidth)}B/s this machine reads at {held / 1e6:.3g} MB"
    if bound == "memory":
        why = f"{name} is memory-bound: {mbu:.0%} of {reading}"
    elif bound == "compute":
        why = f"{name} is compute-bound: {mfu:.0%} of the {_giga(rate)}FLOP/s this machine multiplies in {arithmetic}"
    elif bound == "overhead":
        why = f"{name} is overhead-bound: reading explains {mbu:.0%} of its time and arithmetic {mfu:.0%}"
    else:
        missing = "its FLOPs are not counted" if flops is None else _no_rate(arithmetic, ceilings)
        why = f"what binds {name} is not known: reading explains {mbu:.0%} of its time, and {missing}"
    if share > IMPOSSIBLE:
        why += (
            "; no engine can do that, so the ceiling is too low: measure it again with pipelines/ceilings.py again=true"
        )
    elif bound is not None and share < 1:
        why += f"; at the limit it would be {1 / share:.3g}x faster"
    return {
        "bytes": round(read_bytes),
        "working_set_bytes": round(held),
        "flops": flops,
        "memory_seconds": memory,
        "compute_seconds": compute,
        "measured_seconds": measured_seconds,
        "mbu": mbu,
        "mfu": mfu,
        "bound": bound,
        "share": share,
        "why": why,
    }


def _no_rate(arithmetic: str, ceilings: Json) -> str:
    reason = ceilings["why"].get(f"matmul_flops_per_second.{arithmetic}")
    return str(reason or f"no ceiling is known for {arithmetic}")


def _giga(value: float) -> str:
    """`63.2 G`, or with another prefix for a very fast device."""
    return f"{value / 1e12:.3g} T" if value >= 1e12 else f"{value / 1e9:.3g} G"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
