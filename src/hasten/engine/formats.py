"""Which engine runs which grid natively, and what it can keep keys and values in, as tables: what every engine says
when it is asked (`reads`).

python -m hasten.engine.formats        # Markdown, as in docs/engines.md
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hasten.artifacts import Json, Variant, write_json
from hasten.config import discover
from hasten.engine.base import Dtype, Engine, Support
from hasten.errors import UserError

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
CACHES = (Dtype.float32, Dtype.float16, Dtype.bfloat16, Dtype.int8)


def answers() -> dict[str, dict[str, Support]]:
    """By engine and grid, for a Llama that every engine knows and default options."""
    from hasten.model.grid import Grid

    found: dict[str, dict[str, Support]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number, (title, grid) in enumerate(GRIDS.items()):
            folder = Path(name, str(number))
            folder.mkdir()
            variant = llama(folder, Grid(*grid).describe() if grid else None)
            for engine, component in engines().items():
                found.setdefault(engine, {})[title] = component().reads(variant)
    return found


def caches() -> dict[str, list[Dtype]]:
    """By engine, the types of the KV cache that it takes for a Llama of floats, all else as by default."""
    with tempfile.TemporaryDirectory() as name:
        variant = llama(Path(name), None)
        return {
            engine: [kind for kind in CACHES if keeps(component, kind, variant)]
            for engine, component in engines().items()
        }


def keeps(component: type[Engine], kind: Dtype, variant: Variant) -> bool:
    try:
        return bool(component(kv_cache_dtype=kind).reads(variant))
    except UserError:
        return False


def engines() -> dict[str, type[Engine]]:
    return {name: component for name, component in discover("engine").items() if issubclass(component, Engine)}


def llama(folder: Path, grid: Json | None) -> Variant:
    """A Llama without weights in `folder`."""
    from hasten.model.config import ModelConfig
    from hasten.model.config_json import to_huggingface

    config = to_huggingface(ModelConfig(vocab_size=512), bos_id=0, eos_id=1, pad_id=2)
    write_json(folder / "config.json", config)
    write_json(folder / "manifest.json", {"schema": 1, "grid": grid})
    return Variant(folder)


def cell(support: Support) -> str:
    """The format in which it runs, or the reason for a refusal."""
    return str(support.native_format) if support else f"refused: {support.reason}"


def table() -> str:
    """Markdown: a row for each grid, a column for each engine."""
    found = answers()
    rows = [[grid, *(cell(by_grid[grid]) for by_grid in found.values())] for grid in GRIDS]
    return markdown(["grid", *found], rows)


def cache_table() -> str:
    """Markdown: a row for each type of the KV cache, a column for each engine."""
    found = caches()
    rows = [[kind.name, *("yes" if kind in kinds else "-" for kinds in found.values())] for kind in CACHES]
    return markdown(["KV cache", *found], rows)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["-"] * len(header), *rows])


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n\n{cache_table()}\n")
