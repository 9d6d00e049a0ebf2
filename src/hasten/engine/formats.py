"""Which engine runs which grid natively, as a table: what every engine says when it is asked (`reads`).

python -m hasten.engine.formats        # Markdown, as in docs/engines.md
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hasten.artifacts import Variant, write_json
from hasten.config import discover
from hasten.engine.base import Engine, Support

GRIDS: dict[str, tuple[Any, ...] | None] = {
    "float": None,
    "8 bits, per channel": (8, 0),
    "8 bits, groups of 32": (8, 32),
    "8 bits, groups of 128": (8, 128),
    "4 bits, per channel": (4, 0),
    "4 bits, groups of 32": (4, 32),
    "4 bits, groups of 128": (4, 128),
    "8-bit floats, per channel": (8, 0, True, "float"),
}
"""What `Grid` is made of: bits, group size, symmetric, type."""


def answers() -> dict[str, dict[str, Support]]:
    """By engine and grid, for a Llama that every engine knows and default options."""
    from hasten.model.config import ModelConfig
    from hasten.model.config_json import to_huggingface
    from hasten.model.grid import Grid

    found: dict[str, dict[str, Support]] = {}
    shape = ModelConfig(vocab_size=512)
    with tempfile.TemporaryDirectory() as name:
        for number, (title, grid) in enumerate(GRIDS.items()):
            folder = Path(name, str(number))
            folder.mkdir()
            write_json(folder / "config.json", to_huggingface(shape, bos_id=0, eos_id=1, pad_id=2))
            write_json(folder / "manifest.json", {"schema": 1, "grid": Grid(*grid).describe() if grid else None})
            for engine, component in discover("engine").items():
                assert issubclass(component, Engine)
                found.setdefault(engine, {})[title] = component().reads(Variant(folder))
    return found


def cell(support: Support) -> str:
    """The format in which it runs, or the reason for a refusal."""
    return str(support.native_format) if support else f"refused: {support.reason}"


def table() -> str:
    """Markdown: a row for each grid, a column for each engine."""
    found = answers()
    rows = [["grid", *found], ["-"] * (1 + len(found))]
    rows += [[grid, *(cell(by_grid[grid]) for by_grid in found.values())] for grid in GRIDS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
