"""Attention in training on a CPU: torch's fused kernel and `hasten.model.attention` in turns, in bfloat16.

    python benchmarks/attention.py          # two minutes on two cores

Forward and backward for 2,048 tokens in rows of several lengths: medians, how many times faster the written-down
scores are (median over turns, with quartiles), and how far each result is from one in double precision, in per mille of
its norm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hasten.hardware import keep_freed_memory
from hasten.model.attention import WrittenDown

TOKENS, HEADS, KEY_HEADS, WIDTH, TURNS = 2048, 8, 4, 64, 21
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def written_down(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = WrittenDown.apply(q, k, v, mask, WIDTH**-0.5)  # type: ignore[no-untyped-call]
    return out


def results(kernel: Kernel, given: list[Tensor], slope: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of what went in."""
    leaves = [one.detach().requires_grad_() for one in given]
    out = kernel(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def main() -> None:
    keep_freed_memory()
    table = Table("tokens of a row", "fused (ms)", "written down (ms)", "times faster", "errors (per mille)")
    for length in (64, 128, 256, 512, 1024, 2048):
        generator = torch.Generator().manual_seed(length)
        shapes = [(TOKENS // length, length, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
        *given, slope = (torch.randn(s, generator=generator).bfloat16().transpose(1, 2) for s in shapes)
        kernels = (fused, partial(written_down, torch.ones(length, length, dtype=torch.bool).tril()))
        seconds: list[list[float]] = [[], []]
        for _ in range(TURNS):
            for kernel, taken in zip(kernels, seconds, strict=True):
                start = time.perf_counter()
                results(kernel, given, slope)
                taken.append(time.perf_counter() - start)
        low, middle, high = statistics.quantiles([a / b for a, b in zip(*seconds, strict=True)], n=4)
        exact = results(fused, [one.double() for one in given], slope.double())
        errors = [f"{1000 * error(results(kernel, given, slope), exact):.1f}" for kernel in kernels]
        typical = [f"{1000 * statistics.median(taken):.1f}" for taken in seconds]
        table.add_row(str(length), *typical, f"{middle:.2f}x [{low:.2f}, {high:.2f}]", " and ".join(errors))
    Console(highlight=False, width=110).print(table)


if __name__ == "__main__":
    main()
