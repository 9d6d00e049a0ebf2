"""What an engine says to a variant whose matrices lie on several grids: yes to all of them, or no and to which.

Matrices of one input are one product in most engines (queries, keys and values; gate and up), so that the input is read
once; then they have to lie on one grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hasten.engine.base import Support

if TYPE_CHECKING:
    from hasten.model.grid import Grid, Grids

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices of one input, by the ends of their names."""
FLOAT8 = "there is no kernel here for float8 weights, which GPUs multiply (engine vllm)"


def every(grid: Grid | Grids, ask: Callable[[Grid], Support], *, float8: bool = False) -> Support:
    """All native formats, or the first refusal, which names its grid if there are several.

    float8: whether `ask` knows 8-bit floats; others need not think of them.
    """
    answers = {kind: ask(kind) if float8 or kind.type == "int" else Support(reason=FLOAT8) for kind in grid.kinds}
    for kind, answer in answers.items():
        if not answer:
            return answer if len(answers) == 1 else Support(reason=f"{kind.words}: {answer.reason}")
    formats = dict.fromkeys(str(answer.native_format) for answer in answers.values())
    return Support(native_format=" and ".join(formats), native=all(answer.native for answer in answers.values()))


def apart(grid: Grid | Grids) -> str | None:
    """Why an engine that joins matrices of one input cannot join these, or None."""
    from hasten.model.grid import Grids

    if not isinstance(grid, Grids):
        return None
    for base, _, part in (name.rpartition(".") for name in grid.by_name):
        for parts in TOGETHER:
            found = [grid.by_name.get(f"{base}.{one}") for one in parts]
            if part in parts and len(set(found)) > 1:
                words = ", ".join(kind.words if kind else "floats" for kind in found)
                return f"{', '.join(parts)} of {base} must lie on one grid to be multiplied together, got {words}"
    return None


def table(grid: Grid | Grids | None) -> str | None:
    """Why an engine that looks tokens up in floats cannot in this variant's embedding, or None."""
    from hasten.model.grid import Grids

    found = grid.by_name.get("model.embed_tokens") if isinstance(grid, Grids) else None
    return f"it looks tokens up in a table of floats, got an embedding in {found.words}" if found else None
