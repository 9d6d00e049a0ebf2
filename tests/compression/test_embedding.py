from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.base import Compressor
from hasten.compression.embedding import Embedding
from hasten.compression.make import make_variant
from hasten.compression.mixed import Mixed
from hasten.compression.rtn import Rtn
from hasten.compression.shared.quantiser import Scale, chosen_scale
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.cost import Cost
from hasten.model.grid import Grid, dequantise, grid_of, integers, quantise
from hasten.model.huggingface import load_network
from hasten.model.layout import Format
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_variant

TABLE = "model.embed_tokens"


def chain(folder: Path, *methods: Compressor, **changes: Any) -> list[Variant]:
    """A baseline of that shape, and one child after another."""
    found = [write_variant(folder / "baseline", decoder(shape(**changes)))]
    for number, method in enumerate(methods):
        given = text() if method.needs == "calibration" else None
        target = folder / str(number)
        found.append(make_variant(method, found[-1], given, name=target.name, target=target, seed=0)[0])
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "scale"), [(0, Scale.nearest), (16, Scale.search), (32, Scale.signed)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_is_what_its_own_rounding_makes_and_serves_a_tied_head(
    tmp_path: Path, bits: int, group_size: int, scale: Scale, tied: bool
) -> None:
    own = Embedding(bits=bits, group_size=group_size, scale=scale)
    first, parent, child = chain(tmp_path, Rtn(bits=4, head=False), own, tied_head=tied)
    grid, weight = Grid(bits, group_size), first.tensors()[f"{TABLE}.weight"]
    steps = chosen_scale(weight, grid, scale)
    expected = dequantise(quantise(weight, steps, grid), steps)
    before, after = load_network(parent), load_network(child)
    assert torch.equal(after.model.get_parameter("embed_tokens.weight"), expected)
    assert torch.equal(after.lm_head.weight, expected if tied else before.lm_head.weight)
    assert (after.lm_head.weight is after.model.get_parameter("embed_tokens.weight")) is tied
    same = [name for name in before.state_dict() if "layers" in name]
    assert all(torch.equal(before.get_parameter(name), after.get_parameter(name)) for name in same)
    assert len(list(Eager(threads=1).load(child, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3
    held = grid_of(child)
    assert held is not None
    config = shape(tied_head=tied)
    assert Cost(config).weight_bytes(Format.stored(held)) == sum(value.nbytes for value in child.tensors().values())
    assert child.config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("method", [Rtn(bits=4), Mixed(candidates=[4, 16], bits_per_weight=9.0)], ids=["rtn", "mixed"])
def test_what_the_parent_rounded_stays_as_it_is(tmp_path: Path, method: Compressor) -> None:
    _, parent, child = chain(tmp_path, method, Embedding())
    before, after, held = parent.tensors(), child.tensors(), grid_of(child)
    assert held is not None
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name != f"{TABLE}.weight")
    assert after.keys() - before.keys() == {f"{TABLE}.weight_{part}" for part in ("packed", "scale", "shape")}
    assert integers(after, TABLE, held)[0].dtype is torch.int8
    assert child.config["quantization_config"]["ignore"] == parent.config["quantization_config"]["ignore"]


def test_a_float_parent_and_a_table_of_integers_are_refused(tmp_path: Path) -> None:
    first, _, child = chain(tmp_path, Rtn(), Embedding())
    with pytest.raises(UserError, match=r"embedding needs a quantised parent, got .*baseline which is float"):
        Embedding().compress(first, None, 0)
    with pytest.raises(UserError, match=r"embedding needs a float embedding, got .* whose embedding is quantised"):
        Embedding().compress(child, None, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, r"compression\.bits must be one of \[4, 8\], got 3"),
        ({"group_size": -1}, r"compression\.group_size must be 0 \(whole row\) or more, got -1"),
    ],
)
def test_embedding_refuses_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Embedding(**options)
