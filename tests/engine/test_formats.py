from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hasten.engine.base import Support
from hasten.engine.formats import GRIDS, answers, cache_table, cell, table

ROOT = Path(__file__).parents[2]


def test_the_tables_in_the_docs_are_what_the_engines_say() -> None:
    packages = ("xllamacpp", "gguf", "onnx", "onnxruntime", "openvino")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed, so its engine says that alone")
    text = (ROOT / "docs/engines.md").read_text()
    assert table() in text
    assert cache_table() in text


def test_every_engine_answers_for_every_grid_with_a_format_or_a_reason() -> None:
    for by_grid in answers().values():
        assert by_grid.keys() == GRIDS.keys()
        assert all(bool(support.native_format) != bool(support.reason) for support in by_grid.values())


def test_a_refusal_has_its_reason() -> None:
    assert cell(Support("Q8_0")) == "Q8_0"
    assert cell(Support(reason="no such format")) == "refused: no such format"
