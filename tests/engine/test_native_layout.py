"""Packed weights hold every integer and every scale where the kernels look for it (cpp/kernels.hpp)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.engine.native.layout import Packer, in_blocks, packed_integers, packed_scales, padded
from hasten.errors import UserError
from hasten.model.grid import Grid, stored

LANES = 16


def read(data: Tensor, bits: int, row: int, column: int) -> int:
    """As documented: by block, vector, lane and place within the lane."""
    if bits == 8:
        return int(data[row // LANES, column // 4, row % LANES, column % 4]) - 128
    byte = int(data[row // LANES, column // 8, row % LANES, column % 4])
    return (byte & 15 if column % 8 < 4 else byte >> 4) - 8


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 70), bits=st.sampled_from([4, 8]), seed=st.integers(0, 99))
def test_every_integer_is_where_the_kernels_look_and_padding_is_zero(
    rows: int, columns: int, bits: int, seed: int
) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
    data = packed_integers(q, bits)
    assert data.numel() == padded(rows, 16) * padded(columns, 32) * bits // 8
    for row in range(padded(rows, 16)):
        for column in range(0, padded(columns, 32), 3):
            inside = row < rows and column < columns
            assert read(data, bits, row, column) == (int(q[row, column]) if inside else 0)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 70), together=st.sampled_from([1, 2]))
def test_every_float_is_where_the_kernels_look(rows: int, columns: int, together: int) -> None:
    weight = torch.arange(1.0, rows * columns + 1).view(rows, columns)
    blocks = in_blocks(weight, together)
    for row in range(rows):
        for column in range(columns):
            found = blocks[row // LANES, column // together, row % LANES, column % together]
            assert found == weight[row, column]
    assert blocks.sum() == weight.sum()


def test_scales_lie_sixteen_for_each_group_and_must_fit_float16() -> None:
    scale = torch.arange(1.0, 61).view(20, 3)
    packed = packed_scales(scale)
    assert packed.shape == (2, 3, 16)
    assert packed[1, 2, 3] == scale[19, 2]
    with pytest.raises(UserError, match="scales must be exact in float16"):
        packed_scales(torch.tensor([[1 + 2**-20]]))


@pytest.mark.parametrize(
    ("rows", "in_turns"), [((32, 16), False), ((20, 8), False), ((16, 16), True), ((24, 24), True)]
)
def test_matrices_become_one_below_each_other_or_in_turns(rows: tuple[int, int], in_turns: bool) -> None:
    grid = Grid(4, 32)
    q = [torch.full((count, 32), number + 1, dtype=torch.int8) for number, count in enumerate(rows)]
    scales = [torch.full((count, 1), 2.0**number) for number, count in enumerate(rows)]
    tensors = {}
    for name, values, scale in zip("ab", q, scales, strict=True):
        tensors |= {**stored(name, values, scale, grid), f"{name}.bias": torch.full((len(values),), float(len(values)))}
    made = Packer(tensors, grid, torch.bfloat16).matrix("a", "b", in_turns=in_turns)
    firsts = [read(made.data, 4, row, 0) for row in range(made.data.shape[0] * LANES)]
    if in_turns:
        blocks = padded(rows[0], 16) // 16
        expected = [*[1] * 16, *[2] * 16] * blocks
        expected = [0 if block * 16 // 2 + lane >= rows[0] else value for block, lane, value in placed(expected)]
    else:
        expected = [1] * rows[0] + [2] * rows[1]
        expected += [0] * (len(firsts) - len(expected))
    assert firsts == expected
    assert made.scales.shape == (made.data.shape[0], 1, 16)
    assert len(made.bias) == len(firsts)


def placed(values: list[int]) -> list[tuple[int, int, int]]:
    """(block's number in its own matrix times two, lane, value) for blocks in turns."""
    return [(index // 32 * 2, index % 16, value) for index, value in enumerate(values)]


def test_matrices_of_unlike_formats_are_refused() -> None:
    tensors = {**stored("a", torch.ones(16, 32, dtype=torch.int8), torch.ones(16, 1), Grid(4, 32))}
    tensors["b.weight"] = torch.ones(16, 32)
    with pytest.raises(UserError, match="a and b must be of one format to be multiplied together"):
        Packer(tensors, Grid(4, 32), torch.bfloat16).matrix("a", "b")
