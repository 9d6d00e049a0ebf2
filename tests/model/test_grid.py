from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.model.grid import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Grid,
    Grids,
    by_rows,
    dequantise,
    floats,
    integers,
    pack,
    portable_scale,
    quantise,
    quantised_names,
    quantization_config,
    read_grid,
    stored,
    unpack,
)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Integers of either width, every value of the grid, with rows that do not fill their last word."""
    bits = draw(st.sampled_from([4, 8]))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    return torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8), bits


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_packing_loses_nothing_and_equals_compressed_tensors_bit_for_bit(drawn: tuple[torch.Tensor, int]) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    q, bits = drawn
    packed = pack(q, bits)
    assert packed.dtype is torch.int32
    assert packed.shape == (q.shape[0], math.ceil(q.shape[1] * bits / 32))
    assert torch.equal(packed, pack_to_int32(q, bits))
    assert torch.equal(unpack(packed, bits, q.shape[1]), q)
    assert torch.equal(unpack_from_int32(packed, bits, q.shape), q)


def test_the_first_integer_lies_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4).tolist() == [[0xF10]]
    assert pack(torch.tensor([[-127]], dtype=torch.int8), 8).tolist() == [[1]]
    assert pack(torch.tensor([[7] * 8], dtype=torch.int8), 4).tolist() == [[-1]]  # every bit set


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 4, 16, 32]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 9999),
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_quantise_equals_compressed_tensors_for_the_same_scales(
    bits: int, group_size: int, rows: int, groups: int, seed: int, magnitude: float
) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    grid = Grid(bits, group_size)
    columns = (group_size or 8) * groups
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * magnitude
    largest = weight.view(rows, grid.groups(columns), -1).abs().amax(-1)
    scale = portable_scale(largest / 2 ** (bits - 1) * 0.8)  # small enough for some weights to be clipped
    strategy = "group" if group_size else "channel"
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy=strategy, group_size=group_size or None
    )
    theirs = quantize(weight, scale, torch.zeros_like(scale), arguments, dtype=torch.int8)
    ours = quantise(weight, scale, grid)
    assert torch.equal(ours, theirs)
    assert int(ours.max()) == grid.highest or int(ours.min()) == grid.lowest


def test_halves_are_rounded_to_even_and_the_ends_are_clipped() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 99.0, -99.0]])
    q = quantise(weight, torch.tensor([[1.0]]), Grid(4, 0))
    assert q.tolist() == [[0, 2, 2, 0, -2, 7, 7, -8]]


def test_each_group_has_the_scale_of_its_own_columns() -> None:
    q = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -8]], dtype=torch.int8)
    scale = torch.tensor([[1.0, 10.0], [0.5, 2.0]])
    assert dequantise(q, scale).tolist() == [[1.0, 2.0, 30.0, 40.0], [2.5, 3.0, 14.0, -16.0]]


@settings(max_examples=300, deadline=None)
@given(st.floats(0.0, 1e6, width=32) | st.floats(0.0, 2.0**-20, width=32))
def test_a_portable_scale_is_exact_in_bfloat16_and_float16_and_nearly_what_was_asked_for(wanted: float) -> None:
    scale = portable_scale(torch.tensor(wanted))
    assert scale.dtype is torch.float32
    assert float(scale) > 0
    assert scale.to(torch.float16).float() == scale
    assert scale.to(torch.bfloat16).float() == scale
    within = min(max(wanted, SMALLEST_SCALE), LARGEST_SCALE)
    # half a step of bfloat16's 8 significant bits, then half a step of a subnormal float16
    assert abs(float(scale) - within) <= within * 2**-8 + 2**-25


def test_the_ends_of_the_portable_range_are_its_own_fixed_points() -> None:
    ends = torch.tensor([SMALLEST_SCALE, LARGEST_SCALE])
    assert torch.equal(portable_scale(ends), ends)
    assert torch.equal(portable_scale(torch.tensor([0.0, math.inf])), ends)
    assert portable_scale(torch.tensor([math.nan])).isnan().all()  # must not hide


def test_a_matrix_is_stored_and_read_back_exactly() -> None:
    grid = Grid(4, 8)
    q = torch.randint(-8, 8, (3, 24), dtype=torch.int8)
    scale = portable_scale(torch.rand(3, 3))
    tensors = stored("layer.q_proj", q, scale, grid) | {"layer.norm.weight": torch.ones(2)}
    assert quantised_names(tensors) == ["layer.q_proj"]
    again, scales = integers(tensors, "layer.q_proj", grid)
    assert torch.equal(again, q)
    assert torch.equal(scales, scale)
    opened = floats(tensors, grid)
    assert opened.keys() == {"layer.q_proj.weight", "layer.norm.weight"}
    assert torch.equal(opened["layer.q_proj.weight"], dequantise(q, scale))


def test_integers_without_a_declared_grid_are_refused() -> None:
    tensors = stored("a", torch.zeros(1, 8, dtype=torch.int8), torch.ones(1, 1), Grid(8, 8))
    with pytest.raises(UserError, match="declares no grid"):
        floats(tensors, None)


@pytest.mark.parametrize("lacking", ["weight_scale", "weight_shape"])
def test_a_checkpoint_that_lacks_a_part_of_a_matrix_is_refused_by_name(lacking: str) -> None:
    tensors = stored("a", torch.zeros(1, 8, dtype=torch.int8), torch.ones(1, 1), Grid(8, 8))
    del tensors[f"a.{lacking}"]
    with pytest.raises(UserError, match=rf"a\.{lacking}"):
        floats(tensors, Grid(8, 8))


def test_parts_of_a_matrix_that_do_not_fit_each_other_are_refused() -> None:
    tensors = stored("a", torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1), Grid(8, 8))
    for part, wrong in (
        ("weight_scale", torch.ones(2, 3)),
        ("weight_scale", torch.ones(1, 1)),
        ("weight_shape", torch.tensor([2, 80])),
        ("weight_packed", torch.zeros(2, 1, dtype=torch.int32)),
    ):
        with pytest.raises(UserError, match="matrix a does not fit"):
            floats({**tensors, f"a.{part}": wrong}, Grid(8, 8))


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "words"),
    [
        (3, 32, True, r"bits must be one of \[4, 8\], got 3"),
        (8, -1, True, "group_size must be 0 .per channel. or more, got -1"),
        (8, 32, False, "symmetric must be true, got False"),
    ],
)
def test_a_grid_no_engine_reads_is_refused(bits: int, group_size: int, symmetric: bool, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Grid(bits, group_size, symmetric)


def test_a_group_size_that_does_not_divide_the_width_is_refused_with_both_numbers() -> None:
    assert Grid(8, 16).groups(48) == 3
    assert Grid(8, 0).groups(17) == 1
    with pytest.raises(UserError, match="got 16 for 40"):
        Grid(8, 16).groups(40)


def test_the_quantization_config_is_valid_for_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    group = QuantizationConfig.model_validate(quantization_config(Grid(4, 32), ignore=["lm_head"]))
    weights = group.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 32, True)
    assert str(weights.strategy) == "group"
    assert group.ignore == ["lm_head"]
    assert group.format == "pack-quantized"
    row = QuantizationConfig.model_validate(quantization_config(Grid(8, 0), ignore=[]))
    assert str(row.config_groups["group_0"].weights.strategy) == "channel"


def test_large_matrices_are_computed_some_rows_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 24, generator=torch.Generator().manual_seed(0))
    grid, scale = Grid(4, 8), portable_scale(weight.view(11, 3, 8).abs().amax(-1) / 7.5)
    largest = 0

    def computed() -> list[torch.Tensor]:
        q = quantise(weight, scale, grid)
        return [q, dequantise(q, scale), pack(q, 4), unpack(pack(q, 4), 4, 24)]

    def counted(part: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(part))
        return part

    whole = computed()
    monkeypatch.setattr("hasten.model.grid.WEIGHTS", 4 * 24 + 23)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(whole, computed(), strict=True))
    assert torch.equal(by_rows(counted, weight), weight)
    assert largest == 4
    assert torch.equal(by_rows(counted, weight, rows=5), weight)
    assert largest == 5


INT4, INT8 = Grid(4, 8), Grid(8, 0)
SEVERAL = Grids({"a": INT8, "b": INT4, "c": INT8})


def test_several_grids_say_of_each_matrix_where_it_lies() -> None:
    assert SEVERAL.kinds == (INT4, INT8)
    assert [SEVERAL.of(name) for name in "abc"] == [INT8, INT4, INT8]
    assert SEVERAL.named(INT8) == ["a", "c"]
    assert (SEVERAL.covers("b"), SEVERAL.covers("d"), INT4.covers("d")) == (True, False, True)
    assert (INT4.words, INT8.words) == ("int4 group 8", "int8 per channel")
    with pytest.raises(UserError, match="stores integers of d but its manifest declares no grid for it"):
        SEVERAL.of("d")


@pytest.mark.parametrize("grid", [INT4, SEVERAL])
def test_what_a_manifest_says_of_grids_is_read_back(grid: Grid | Grids) -> None:
    again = read_grid(json.loads(json.dumps(grid.describe())))
    assert again.describe() == grid.describe()
    assert [again.of(name) for name in "abc"] == [grid.of(name) for name in "abc"]
    assert INT4.describe() == {"bits": 4, "group_size": 8, "symmetric": True}


def test_matrices_on_several_grids_are_read_back_exactly() -> None:
    tensors, expected = {}, {}
    for number, name in enumerate("abc"):
        grid = SEVERAL.of(name)
        q = torch.randint(grid.lowest, grid.highest + 1, (3, 16), dtype=torch.int8)
        scale = portable_scale(torch.rand(3, grid.groups(16)) + number)
        tensors |= stored(name, q, scale, grid)
        expected[f"{name}.weight"] = dequantise(q, scale)
    opened = floats(tensors | {"d.weight": torch.ones(2, 2)}, SEVERAL)
    assert opened.keys() == {*expected, "d.weight"}
    assert all(torch.equal(opened[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match="matrix b does not fit"):
        floats(tensors, Grids(dict.fromkeys("abc", INT8)))


def test_several_grids_are_groups_with_named_targets_to_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    groups = QuantizationConfig.model_validate(quantization_config(SEVERAL, ignore=["d"])).config_groups
    assert [(group.targets, group.weights.num_bits, group.weights.group_size) for group in groups.values()] == [
        (["b"], 4, 8),
        (["a", "c"], 8, None),
    ]
