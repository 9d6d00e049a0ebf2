from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hasten.engine.base import Dtype, Support
from hasten.engine.formats import CACHES, GRIDS, answers, cache_table, caches, cell, engines, table
from hasten.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_tables_in_the_docs_are_what_the_engines_say() -> None:
    pytest.importorskip("xllamacpp")
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
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


def test_keys_and_values_are_kept_in_integers_by_those_that_can_and_refused_by_the_others() -> None:
    assert caches().keys() == engines().keys()
    keeping = {name for name, engine in engines().items() if engine.int8_cache}
    assert keeping == {"llamacpp", "native", "openvino"}
    for name, kinds in caches().items():
        assert set(kinds) <= set(CACHES)
        if name not in keeping:
            assert Dtype.int8 not in kinds
            with pytest.raises(UserError, match=f"kv_cache_dtype must be auto or a float for {name}, .*, got int8"):
                engines()[name](kv_cache_dtype=Dtype.int8)


@pytest.mark.parametrize("option", ["weight_dtype", "activation_dtype"])
def test_no_engine_makes_weights_or_activations_integers(option: str) -> None:
    for engine in engines().values():
        with pytest.raises(UserError, match=f"engine.{option} must be auto or a float, .*, got int8"):
            engine(**{option: Dtype.int8})
