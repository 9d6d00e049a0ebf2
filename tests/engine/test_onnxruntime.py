"""What only the engine `onnxruntime` has; the rest is in `test_conformance` and `test_parity`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.artifacts import Variant
from hasten.config import QUIET
from hasten.engine.base import Dtype, Request
from hasten.engine.onnxruntime import Onnxruntime, OnnxruntimeSession
from hasten.engine.onnxruntime.blocks import BLOCKS, block_size, packed, scales
from hasten.engine.onnxruntime.runtime import TELEMETRY, rounds_activations, runtime
from hasten.errors import UserError
from hasten.model.cost import cost_of
from hasten.model.grid import Grid, dequantise, stored
from tests.engine import llama
from tests.engine.llama import ids, on_grid, prompt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EXACT = {"threads": 1, "activation_dtype": Dtype.float32, "max_context": 256}


def session(variant: Variant, cache: Path, **options: Any) -> closing[OnnxruntimeSession]:
    return closing(Onnxruntime(**{**EXACT, **options}).load(variant, cache))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 16, 32, 48, 96, 128, 256, 512]),
    columns=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_every_integer_and_every_scale_is_where_the_kernels_look(
    rows: int, groups: int, bits: int, group_size: int, columns: int, seed: int
) -> None:
    """As MatMulNBits documents it: block by block, the first of two 4-bit integers in a byte's low half."""
    generator = torch.Generator().manual_seed(seed)
    columns = group_size * groups if group_size else columns
    q, scale = random_matrix(Grid(bits, group_size), rows, columns, generator)
    block = block_size(group_size, columns)
    assert block in BLOCKS
    data, by_block = packed(q, bits, block), scales(scale, columns, block)
    assert data.shape == (rows, -(-columns // block), block * bits // 8)
    unsigned = data.flatten(1)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], -1).flatten(1)
    padded = unsigned.int() - (8 if bits == 4 else 128)
    assert torch.equal(padded[:, :columns], q.int())
    assert not padded[:, columns:].any()
    found = padded * by_block.repeat_interleave(block, 1)
    assert torch.equal(found[:, :columns], dequantise(q, scale))


def random_matrix(grid: Grid, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    q = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), generator=generator, dtype=torch.int8)
    return q, 0.5 + torch.rand(rows, grid.groups(columns), generator=generator)


def product(q: Tensor, scale: Tensor, grid: Grid, level: int, x: Tensor, folder: Path) -> Tensor:
    """x times a stored matrix, by MatMulNBits."""
    from hasten.engine.onnxruntime.graph import Graph

    folder.mkdir(exist_ok=True)
    graph = Graph(stored("w", q, scale, grid), grid, level, folder)
    y = graph.linear("x", "w")
    graph.save({"x": (onnx.TensorProto.FLOAT, [*x.shape])}, {y: (onnx.TensorProto.FLOAT, [len(x), len(q)])})
    found = runtime().InferenceSession(folder / "model.onnx").run(None, {"x": x.numpy()})
    return torch.from_numpy(found[0]).double()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "columns"), [(16, 48), (32, 96), (64, 192), (128, 256), (256, 512), (96, 288), (0, 256), (0, 72)]
)
def test_it_multiplies_those_integers(tmp_path: Path, bits: int, group_size: int, columns: int) -> None:
    """With float32 activations, and with those that are rounded to 8 bits block by block, against float64."""
    generator, grid = torch.Generator().manual_seed(columns), Grid(bits, group_size)
    q, scale = random_matrix(grid, 33, columns, generator)
    weight = dequantise(q, scale).double()
    for tokens in (1, 5):
        x = torch.randn(tokens, columns, generator=generator)
        expected = x.double() @ weight.T
        assert (product(q, scale, grid, 1, x, tmp_path / "float") - expected).norm() < 1e-5 * expected.norm()
        padded = torch.nn.functional.pad(x, (0, -columns % block_size(group_size, columns)))
        blocks = padded.view(tokens, -1, block_size(group_size, columns)).double()
        step = blocks.abs().amax(-1, keepdim=True) / 127
        rounded = ((blocks / step).round() * step).flatten(1)[:, :columns]
        found = product(q, scale, grid, 4, x, tmp_path / "int8")
        error, rounding = (found - rounded @ weight.T).norm(), (found - expected).norm()
        assert error < 0.1 * rounding  # a value in the middle of two integers may be rounded to the other one


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return llama.variant(tmp_path_factory.mktemp("variant") / "v", llama.shape())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, variant: Variant) -> Iterator[OnnxruntimeSession]:
    with session(variant, tmp_path_factory.mktemp("cache"), micro_batch=16) as one:
        yield one


def test_prompts_are_read_a_micro_batch_at_a_time(loaded: OnnxruntimeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, logits = [], loaded.model.logits

    def recorded(rows: list[tuple[int, ...]], past: list[int], first: int = 0) -> Tensor:
        lengths.append((len(rows[0]), past[0]))
        return logits(rows, past, first)

    monkeypatch.setattr(loaded.model, "logits", recorded)
    assert len(ids(loaded.submit(Request(0, prompt(40), 3)))) == 3
    assert lengths == [(16, 0), (16, 16), (8, 32), (1, 40), (1, 41)]


def test_one_failure_is_told_to_its_readers_and_the_next_request_is_answered(
    loaded: OnnxruntimeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids(loaded.submit(Request(0, prompt(9), 5)))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="onnxruntime failed: no memory"):
        patch.setattr(loaded.model, "logits", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        list(loaded.submit(Request(1, prompt(9), 5)))
    assert ids(loaded.submit(Request(2, prompt(9), 5))) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_it_says_what_it_reads_and_what_it_holds(tmp_path: Path, tied: bool) -> None:
    config = llama.shape(tied_head=tied, qkv_bias=True)
    cost = cost_of(config)
    row, table = (config.hidden_size, cost.head.weights) if tied else (0, 0)  # a tied head is a copy of the table
    with session(llama.variant(tmp_path / "v", config), tmp_path) as engine:
        assert engine.weight_bytes_per_token == 4 * (cost.parameters_per_token + row)
        assert engine.kernel == engine.arithmetic == "float32"
        assert engine.kv_bytes_per_position == cost.kv_bytes(1, 4)
        assert engine.memory() == {"weights": 4 * (cost.parameters + table), "kv_cache": cost.kv_bytes(256, 4)}


def test_integers_are_fewer_bytes_and_longer_groups_fewer_still(tmp_path: Path) -> None:
    config = llama.shape(tied_head=False)
    parent = llama.variant(tmp_path / "v", config)
    matrices = cost_of(config).matrices
    weights = sum(matrix.weights for matrix in matrices) + cost_of(config).head.weights
    floats = 4 * (cost_of(config).vector_parameters + config.hidden_size)
    for bits, group_size in ((4, 32), (4, 64), (8, 32)):
        with session(on_grid(parent, bits, group_size), tmp_path, activation_dtype=Dtype.auto) as engine:
            blocks = 8 * weights // group_size  # a scale and a sum each
            assert engine.weight_bytes_per_token == weights * bits // 8 + blocks + floats
            assert engine.kernel == f"int{bits} block {group_size}"


def test_the_build_is_kept_and_other_activations_are_another_one(
    tmp_path: Path, variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.engine.onnxruntime import graph

    write, late = graph.write, [0.0]

    def writing(*arguments: Any) -> dict[str, int]:
        late[0] += 1000  # seconds, which nothing but a build takes
        return write(*arguments)

    monkeypatch.setattr(graph, "write", writing)
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0])
    monkeypatch.setattr("hasten.engine.onnxruntime.time", clock)
    made = on_grid(llama.variant(tmp_path / "v", llama.shape()), 4, 32)
    engines = [Onnxruntime(activation_dtype=dtype) for dtype in (Dtype.auto, Dtype.float32)]
    folders = [engine.build(made, tmp_path) for engine in engines]
    assert len(set(folders)) == 2
    before = (folders[0] / "weights.bin").stat().st_mtime_ns
    assert engines[0].build(made, tmp_path) == folders[0]
    assert (folders[0] / "weights.bin").stat().st_mtime_ns == before
    with closing(engines[0].load(made, tmp_path)) as found, closing(engines[0].load(made, tmp_path / "new")) as fresh:
        assert 0 <= found.compile_seconds < 1000 <= fresh.compile_seconds
        assert found.load_seconds > 0


def test_eight_bits_with_float_activations_are_labelled_dequantised(tmp_path: Path) -> None:
    made = on_grid(llama.variant(tmp_path / "v", llama.shape()), 8, 32)
    support = Onnxruntime(activation_dtype=Dtype.float32).supports(made)
    assert (support.native, support.native_format) == (False, "float32 (dequantised in every pass)")
    assert Onnxruntime().supports(made).native
    with session(made, tmp_path) as floats, session(made, tmp_path, activation_dtype=Dtype.auto) as integers:
        assert floats.kernel == support.native_format
        assert floats.weight_bytes_per_token > 3 * integers.weight_bytes_per_token
        assert (floats.memory()["weights"] or 0) < (integers.memory()["weights"] or 0)


def test_nothing_is_reported() -> None:
    runtime()
    assert os.environ[TELEMETRY] == QUIET[TELEMETRY] == "1"


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.9.2")
    with pytest.raises(UserError, match=r"onnxruntime must be at least 1\.32, got 1\.9\.2"):
        runtime()


def test_a_processor_without_integer_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounds_activations(4)
    assert rounds_activations(8)
    made = on_grid(llama.variant(tmp_path / "v", llama.shape()), 4, 32)
    monkeypatch.setattr("hasten.engine.onnxruntime.rounds_activations", lambda bits: False)
    with pytest.raises(UserError, match="onnxruntime has no integer kernels for this processor"):
        Onnxruntime().load(made, tmp_path)


def test_what_it_cannot_run_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = llama.variant(tmp_path / "odd", llama.shape(), grid=Grid(4, 24))
    words = "group_size must be 0 or a multiple of 16, got 24"
    assert words in str(Onnxruntime().supports(odd).reason)
    with pytest.raises(UserError, match=f"onnxruntime cannot run odd: .*{words}"):
        Onnxruntime().load(odd, tmp_path)
    narrow = llama.variant(tmp_path / "narrow", llama.shape(head_size=24))
    assert "a multiple of 16 values, got 24" in str(Onnxruntime().supports(narrow).reason)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'onnxruntime is not installed: pip install "hasten[onnxruntime]"' in str(Onnxruntime().supports(odd).reason)


def test_biases_that_config_json_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    broken = llama.rewrite(variant, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    with pytest.raises(UserError, match=r"tensors do not fit config.json: model.layers.0.self_attn.q_proj.bias$"):
        Onnxruntime().load(broken, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["cuda:0"]}, r"devices must be \[cpu\] for onnxruntime, got \['cuda:0'\]"),
        ({"weight_dtype": Dtype.bfloat16}, "engine.weight_dtype must be auto or float32 .* got bfloat16"),
        ({"activation_dtype": Dtype.float16}, "engine.activation_dtype must be auto or float32 .* got float16"),
        ({"kv_cache_dtype": Dtype.float16}, "engine.kv_cache_dtype must be auto or float32 .* got float16"),
        ({"micro_batch": 0}, "engine.micro_batch must be 1 to 4096, got 0"),
        ({"slots": 0}, "engine.slots must be 1 to 256, got 0"),
    ],
)
def test_options_are_checked_at_the_door(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Onnxruntime(**options)
