"""What only the engine `openvino` has; the rest is in `test_conformance` and `test_parity`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine import openvino as engines
from hasten.engine.base import Dtype, Request
from hasten.engine.openvino import Openvino, OpenvinoSession, has_bfloat16
from hasten.engine.openvino.graph import Graph
from hasten.engine.openvino.passes import Pass, Sequence
from hasten.engine.openvino.runtime import runtime
from hasten.engine.streaming import Flight
from hasten.errors import UserError
from hasten.hardware import cpu_flags
from hasten.model.grid import Grid, Grids, dequantise, stored
from hasten.model.huggingface import load_network
from tests.engine import llama
from tests.engine.llama import far_from_best, ids, on_grid, prompt

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
EXACT: dict[str, Any] = {
    "threads": 2,
    "weight_dtype": Dtype.float32,
    "activation_dtype": Dtype.float32,
    "kv_cache_dtype": Dtype.float32,
    "max_context": 256,
}


def session(variant: Variant, cache: Path, **options: Any) -> closing[OpenvinoSession]:
    return closing(Openvino(**{**EXACT, **options}).load(variant, cache))


def test_importing_it_tells_nobody(tmp_path: Path) -> None:
    """By itself the package writes an identity for its user and reports each import under it."""
    code = "from hasten.engine.openvino.runtime import runtime; assert runtime().Core().available_devices"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    assert list(tmp_path.iterdir()) == []


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """A grid, and integers and scales on it."""
    bits, group = draw(st.sampled_from((4, 8))), draw(st.sampled_from((0, 8, 16, 32, 64, 128)))
    rows, groups = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    columns = groups * group or draw(st.integers(1, 100)) * (2 if bits == 4 else 1)
    grid, generator = Grid(bits, group), torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    q = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.rand((rows, grid.groups(columns)), generator=generator).bfloat16().float() / 8 + 2**-8
    return grid, q, scale


def graph_of(grid: Grid, q: torch.Tensor, scale: torch.Tensor) -> Graph:
    return Graph(llama.shape(), stored("m", q, scale, grid), grid, "float32", 4)


def outputs(node: Any, inputs: list[Any], *values: Any, rounded: int = 0) -> Any:
    """What a graph computes, as a session would compile it."""
    properties = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": rounded}
    compiled = runtime().Core().compile_model(runtime().Model([node], inputs, "test"), "CPU", properties)
    return compiled(list(values))[0]


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_integers_and_scales_reach_the_graph_bit_for_bit(matrix: tuple[Grid, torch.Tensor, torch.Tensor]) -> None:
    grid, q, scale = matrix
    found = outputs(graph_of(*matrix).quantised({"m": len(q)}, q.shape[1]), [])
    assert torch.equal(torch.from_numpy(np.array(found)), dequantise(q, scale))
    assert graph_of(*matrix).grid == grid


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(1, 40), st.sampled_from((0, 32)))
def test_products_with_compressed_weights_are_right(
    matrix: tuple[Grid, torch.Tensor, torch.Tensor], tokens: int, rounded: int
) -> None:
    """Activations are rounded by half a step of 127 in their group's largest, or not at all."""
    grid, q, scale = matrix
    graph = graph_of(*matrix)
    x = graph.ops.parameter([-1, 1, q.shape[1]], runtime().Type.f32)
    values = torch.randn((tokens, 1, q.shape[1]), generator=torch.Generator().manual_seed(tokens))
    rounded = 0 if 0 < grid.group_size < rounded else rounded
    found = outputs(graph.linear(x, "m", *q.shape), [x], values.numpy(), rounded=rounded)
    weight = dequantise(q, scale).double()
    step = float(values.abs().max()) / 254 if rounded else 0.0
    allowed = 1.02 * step * weight.abs().sum(-1) + 1e-5 * float(weight.abs().max()) * q.shape[1]
    assert bool(((torch.from_numpy(np.array(found)) - values.double() @ weight.T).abs() <= allowed).all())


@pytest.mark.parametrize("grids", [(Grid(8, 32), Grid(8, 32)), (Grid(4, 0), Grid(4, 0)), (Grid(4, 32), Grid(8, 32))])
def test_matrices_below_each_other_are_the_same_products(grids: tuple[Grid, Grid]) -> None:
    """Alike they are one product, on different grids one each; a bias belongs to its own matrix."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"b.bias": torch.randn(6, generator=generator)}
    expected, values = [], torch.randn((5, 1, 64), generator=generator)
    for name, rows, grid in (("a", 4, grids[0]), ("b", 6, grids[1])):
        q = torch.randint(grid.lowest, grid.highest + 1, (rows, 64), generator=generator).to(torch.int8)
        scale = torch.rand((rows, grid.groups(64)), generator=generator).bfloat16().float() / 8 + 2**-8
        tensors.update(stored(name, q, scale, grid))
        expected.append(values @ dequantise(q, scale).T)
    expected[1] = expected[1] + tensors["b.bias"]
    graph = Graph(llama.shape(), tensors, Grids(dict(zip("ab", grids, strict=True))), "float32", 4)
    x = graph.ops.parameter([-1, 1, 64], runtime().Type.f32)
    parts = graph.linears(x, {"a": 4, "b": 6}, 64)
    model = runtime().Model([graph.ops.result(graph.ops.concat(parts, -1))], [x], "test")
    assert sum(node.get_type_name() == "MatMul" for node in model.get_ops()) == len(set(grids))
    found = outputs(graph.ops.concat(parts, -1), [x], values.numpy())
    assert torch.allclose(torch.from_numpy(np.array(found)), torch.cat(expected, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
def test_integers_meet_bfloat16_if_asked(tmp_path: Path) -> None:
    variant = on_grid(llama.variant(tmp_path / "v", llama.shape()), 4, 32)
    model = load_network(variant).eval()
    low = {"weight_dtype": Dtype.auto, "activation_dtype": Dtype.bfloat16, "kv_cache_dtype": Dtype.auto}
    with session(variant, tmp_path, **low) as engine:
        assert engine.arithmetic == "bfloat16"
        assert engine.kernel.startswith("i4 (") and engine.kernel.endswith("bf16)")
        worst = [far_from_best(model, p, ids(engine.submit(Request(0, p, 1)))) for p in map(prompt, range(20, 40))]
    assert sum(one == 0 for one in worst) >= 16


@pytest.mark.skipif("avx512_vnni" not in cpu_flags(), reason="rounds activations only where there is VNNI")
def test_activations_are_rounded_by_the_group_and_only_if_asked(tmp_path: Path) -> None:
    variant = on_grid(llama.variant(tmp_path / "v", llama.shape()), 8, 64)
    asked, found = prompt(20), {}
    for name, options in {
        "float32": {}, "off": {"activation_dtype": Dtype.auto, "activation_group": 0},
        "32": {"activation_dtype": Dtype.auto}, "64": {"activation_dtype": Dtype.auto, "activation_group": 64},
    }.items():  # fmt: skip
        with session(variant, tmp_path, **options) as engine:
            assert engine.arithmetic == ("int8" if name.isdigit() else "float32")
            assert engine.kernel.endswith(f", activations in int8 groups of {name}") == name.isdigit()
            one = Sequence(Flight(Request(0, asked, 1)), 0, list(asked))
            found[name] = engine._logits(Pass([(one, len(asked))])).copy()
    assert (found["off"] == found["float32"]).all()
    differences = [float(np.abs(found[name] - found["float32"]).max()) for name in ("32", "64")]
    assert 0.01 < differences[0] != differences[1] > 0.01


@pytest.mark.parametrize(
    ("weights", "cache", "arithmetic"),
    [
        (Dtype.auto, Dtype.auto, "bfloat16" if has_bfloat16() else "float32"),
        (Dtype.float32, Dtype.float16, "float32"),
    ],
)
def test_half_weights_and_half_caches_are_close(tmp_path: Path, weights: Dtype, cache: Dtype, arithmetic: str) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    model = load_network(variant).eval()
    options = {"weight_dtype": weights, "activation_dtype": Dtype.auto, "kv_cache_dtype": cache}
    with session(variant, tmp_path, **options) as engine:
        assert engine.arithmetic == arithmetic
        assert engine.kv_bytes_per_position == 2 * 2 * 2 * 16 * 2
        worst = [far_from_best(model, p, ids(engine.submit(Request(0, p, 1)))) for p in map(prompt, range(20, 40))]
    assert sum(one == 0 for one in worst) >= 16
    assert max(worst) < 0.5


def test_a_pass_takes_the_newest_tokens_first_and_cuts_a_prompt_where_it_is_full() -> None:
    def sequence(number: int, length: int, cached: int) -> Sequence:
        flight = Flight(Request(number, (1,) * length, 1))
        return Sequence(flight, number, list(range(length)), cached)

    long, going, next_ = sequence(0, 70, 32), sequence(1, 40, 39), sequence(2, 9, 0)
    now = Pass.of([long, going, next_], 20)
    assert now.parts == [(going, 1), (long, 19)]
    assert now.ready == [going]
    found = {name: value.tolist() for name, value in now.inputs(blocks=4).items()}
    assert found == {
        "input_ids": [39, *range(32, 51)],
        "position_ids": [39, *range(32, 51)],
        "past_lens": [39, 32],
        "subsequence_begins": [0, 1, 20],
        "block_indices": [4, 5, 0, 1],
        "block_indices_begins": [0, 2, 4],
        "max_context_len": 51,
        "wanted": [0],
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenvinoSession]:
    folder = tmp_path_factory.mktemp("variant")
    with session(llama.variant(folder / "v", llama.shape()), folder) as one:
        yield one


def test_the_session_says_what_it_runs_and_what_it_holds(loaded: OpenvinoSession) -> None:
    config = llama.shape()
    matrices = sum(v.numel() * 4 for v in llama.random_tensors(config).values() if v.dim() == 2)
    table = config.vocab_size * config.hidden_size * 4
    assert loaded.kernel.startswith("f32 (")
    assert "undef" not in loaded.kernel
    assert loaded.weight_bytes_per_token == matrices + config.hidden_size * 4
    kv = 2 * config.layers * config.kv_heads * config.head_width * 256 * 4
    assert loaded.memory() == {"weights": matrices + table, "kv_cache": kv}  # the head is packed anew
    assert loaded.kv_bytes_per_position * 256 == kv
    assert loaded.compile_seconds > 0 < loaded.load_seconds


def test_a_float_head_beside_integers_is_counted_as_it_is_kept(tmp_path: Path) -> None:
    """The plugin widens its bfloat16 beside float32 activations."""
    plain = llama.variant(tmp_path / "v", llama.shape(tied_head=False))
    made = make_variant(Rtn(bits=8, head=False), plain, None, name="w", target=tmp_path / "w", seed=0)[0]
    with session(made, tmp_path, weight_dtype=Dtype.bfloat16) as engine:
        assert {part.split(" ")[0] for part in engine.kernel.split(", ")} == {"f32", "i8"}
        inner = sum(v.numel() for name, v in llama.random_tensors(llama.shape()).items() if "_proj" in name)
        assert engine.weight_bytes_per_token == inner + inner // 32 * 4 + 320 * 64 * 4 + 64 * 2


def test_longer_groups_are_fewer_bytes(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape(tied_head=False))
    weights = sum(
        v.numel()
        for name, v in llama.random_tensors(llama.shape(tied_head=False)).items()
        if "_proj" in name or "head" in name
    )
    for group_size in (32, 64):
        with session(on_grid(variant, 4, group_size), tmp_path) as engine:
            assert engine.weight_bytes_per_token == weights // 2 + weights // group_size * 4 + 64 * 4


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.float16, Dtype.bfloat16])
def test_what_a_request_left_in_its_slot_meets_nobody(tmp_path: Path, dtype: Dtype) -> None:
    """Not even times zero, which would turn what is not finite into the next request's error."""
    if dtype is Dtype.bfloat16 and not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    low = {"weight_dtype": Dtype.auto, "activation_dtype": Dtype.auto} if dtype is Dtype.bfloat16 else {}
    requests = [Request(i, prompt(length), 20) for i, length in enumerate((1, 9, 40))]
    with session(llama.variant(tmp_path / "v", llama.shape()), tmp_path, kv_cache_dtype=dtype, **low) as engine:
        expected = [ids(engine.submit(request)) for request in requests]
        for cache in engine._caches.values():
            cache.data[...] = np.nan
        assert [ids(engine.submit(request)) for request in requests] == expected


def test_what_the_library_raises_reaches_the_reader_and_the_next_request_is_answered(
    loaded: OpenvinoSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(loaded, "_logits", lambda now: 1 / 0)
        with pytest.raises(RuntimeError, match="OpenVINO failed: division by zero"):
            list(loaded.submit(Request(0, prompt(4), 3)))
    assert len(ids(loaded.submit(Request(0, prompt(4), 3)))) == 3


def test_what_it_cannot_run_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama.variant(tmp_path / "v", llama.shape(hidden_size=96, head_size=24, feed_forward_size=96))
    odd, small = on_grid(plain, 4, 48), on_grid(plain, 8, 16)
    assert "right for groups of a power of two, got group_size 48" in str(Openvino().supports(odd).reason)
    assert "activation_group must be at most group_size (16), got 32" in str(Openvino().supports(small).reason)
    assert Openvino(activation_group=16).supports(small)
    assert Openvino(activation_dtype=Dtype.float32).supports(small).native_format == "int8 group 16"
    lopsided = llama.variant(tmp_path / "lopsided", llama.shape(feed_forward_size=77))
    assert "4-bit rows of an even length" in str(Openvino().supports(on_grid(lopsided, 4, 0)).reason)
    half = Openvino(weight_dtype=Dtype.float32, kv_cache_dtype=Dtype.bfloat16)
    assert "must be auto or float16 or float32 or int8, got bfloat16" in str(half.supports(plain).reason)
    with pytest.raises(UserError, match="openvino cannot run v: beside float32 activations"):
        half.load(plain, tmp_path)
    widened = Openvino(weight_dtype=Dtype.bfloat16, activation_dtype=Dtype.float32)
    assert "weight_dtype must be float32" in str(widened.supports(plain).reason)
    assert widened.supports(on_grid(plain, 8, 32))  # only its embedding is of floats
    monkeypatch.setattr(engines, "cpu_flags", list)
    assert Openvino(weight_dtype=Dtype.auto).supports(plain).native_format == "float32"
    assert "no bfloat16" in str(
        Openvino(weight_dtype=Dtype.auto, activation_dtype=Dtype.bfloat16).supports(plain).reason
    )
    assert "with AVX2" in str(Openvino().supports(small).reason)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2027.1.0")
    assert "made for OpenVINO 2026.4, got 2027.1.0" in str(Openvino().supports(plain).reason)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Openvino().supports(plain).reason == 'openvino is not installed: pip install "hasten[openvino]"'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["cuda:0"]}, r"devices must be \[cpu\] for openvino"),
        ({"activation_dtype": Dtype.float16}, "activation_dtype must be auto, bfloat16 or float32 .* got float16"),
        ({"weight_dtype": Dtype.float16}, "weight_dtype must be auto, bfloat16 or float32 .* got float16"),
        ({"activation_dtype": Dtype.bfloat16}, "weight_dtype must be auto or bfloat16 beside .* got float32"),
        ({"activation_group": 48}, r"activation_group must be one of \(0, 16, .* got 48"),
        ({"slots": 0}, "slots must be 1 to 256, got 0"),
        ({"slots": 8, "micro_batch": 4}, r"micro_batch must be slots \(8\) to 4096, got 4"),
    ],
)
def test_options_are_checked_at_the_door(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Openvino(**options)
