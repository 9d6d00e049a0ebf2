from __future__ import annotations

import pytest

from hasten.errors import UserError
from hasten.importing.fit import expected_shapes
from tests.tiny import shape


def test_more_bytes_than_can_be_counted_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"config\.json asks for tensors of an impossible size"):
        expected_shapes(shape(hidden_size=2**30, heads=2**20, kv_heads=2**20, head_size=2**20))


def test_a_tied_head_is_expected_once() -> None:
    assert "lm_head.weight" not in expected_shapes(shape())
    assert expected_shapes(shape(tied_head=False))["lm_head.weight"] == (100, 32)
