"""What only the engine `compiled` has; the rest is in `test_conformance`."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.artifacts import Variant
from hasten.engine.base import Dtype, Request
from hasten.engine.compiled import VNNI, Compiled, CompiledSession, passes
from hasten.engine.compiled.kernels import Product
from hasten.engine.compiled.matrices import unsupported
from hasten.engine.native import build
from hasten.engine.streaming import Flight
from hasten.engine.torch_options import CACHE_VARIABLE
from hasten.errors import UserError
from hasten.hardware import cpu_flags
from hasten.model.config import ModelConfig
from hasten.model.cost import cost_of
from hasten.model.grid import Grid
from hasten.model.huggingface import load_network
from tests.engine import llama
from tests.engine.llama import far_from_best, ids, prompt

FLOAT = Dtype.float32
EXACT: dict[str, Any] = {"threads": 1, "weight_dtype": FLOAT, "activation_dtype": FLOAT, "max_context": 96}
PLAIN: dict[str, Any] = {**EXACT, "compile": False}
NEAR_TIE = 0.01
needs_vnni = pytest.mark.skipif(VNNI.isdisjoint(cpu_flags()), reason="rounds activations only where there is VNNI")
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
GRIDS = {"float": None, "int8": Grid(8, 0), "int4-32": Grid(4, 32), "int4-64": Grid(4, 64)}


def made(folder: Path, config: ModelConfig, grid: Grid | None = None) -> Variant:
    """A random variant; a quantised head is no longer the embedding."""
    if grid is None:
        return llama.variant(folder, config)
    config = replace(config, tied_head=False)
    return llama.variant(folder, config, llama.quantised(llama.random_tensors(config), grid), grid)


def opened(variant: Variant, cache: Path, **options: Any) -> closing[CompiledSession]:
    return closing(Compiled(**options).load(variant, cache))


@pytest.mark.parametrize(
    ("grid", "kernel"),
    [
        pytest.param(Grid(8, 0), "int8 per channel, int8 activations per token of a prompt", marks=needs_vnni),
        pytest.param(Grid(4, 32), "int4 group 32, int8 activations per 32 (", marks=[needs_vnni, needs_compiler]),
        pytest.param(Grid(4, 0), "int4 per channel, int8 activations per 32 (", marks=needs_compiler),
        pytest.param(Grid(8, 32), "int8 group 32, int8 activations per 32 (", marks=needs_compiler),
    ],
)
@pytest.mark.parametrize("biases", [False, True])
def test_rounding_is_what_auto_means_and_is_recorded(tmp_path: Path, grid: Grid, kernel: str, biases: bool) -> None:
    variant = made(tmp_path / "v", llama.shape(qkv_bias=biases, output_bias=biases, mlp_bias=biases), grid)
    network = load_network(variant).eval()
    prompts = [prompt(20, seed) for seed in range(20)]
    with opened(variant, tmp_path, **{**PLAIN, "activation_dtype": Dtype.auto}) as session:
        assert session.kernel.startswith(kernel)
        assert session.arithmetic == "int8"
        firsts = [ids(session.submit(Request(i, asked, 1))) for i, asked in enumerate(prompts)]
    assert sum(far_from_best(network, *pair) == 0 for pair in zip(prompts, firsts, strict=True)) >= 16


def test_nothing_is_rounded_where_nothing_multiplies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**PLAIN, "activation_dtype": Dtype.auto}
    assert not Compiled(devices=["cuda:0"]).rounds
    assert Compiled(devices=["cuda:0"]).describe()["activation_dtype"] == "float32"
    with pytest.raises(
        UserError, match=r"engine\.activation_dtype must be auto or a float, integers are the variant's"
    ):
        Compiled(activation_dtype=Dtype.int8)
    monkeypatch.setattr("hasten.engine.compiled.cpu_flags", lambda: ["avx2"])
    for grid in (Grid(8, 0), Grid(4, 32)):
        with opened(made(tmp_path / grid.words, llama.shape(), grid), tmp_path, **options) as session:
            assert (session.kernel, session.arithmetic) == (grid.words, "float32")
            assert ids(session.submit(Request(0, prompt(9), 4)))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert Compiled(**options).product(Grid(8, 32)) is Product.widened


@given(length=st.integers(1, 3000), sizes=st.lists(st.integers(2, 300), min_size=1, max_size=4, unique=True))
def test_passes_cover_a_prompt_and_only_the_last_is_padded(length: int, sizes: list[int]) -> None:
    found = list(passes(length, sorted(sizes)))
    assert [start for start, _ in found] == [sum(size for _, size in found[:i]) for i in range(len(found))]
    end = sum(found[-1])
    assert length <= end < length + min(sizes)
    assert {size for _, size in found} <= set(sizes)


@pytest.mark.parametrize("name", llama.CASES)
def test_every_family_answers_as_the_network_does(tmp_path: Path, name: str) -> None:
    variant = llama.variant(tmp_path / "v", llama.CASES[name])
    network = load_network(variant).eval()
    with opened(variant, tmp_path, **PLAIN) as session:
        for length in (1, 16, 45):
            found = ids(session.submit(Request(0, prompt(length, length), 20)))
            assert far_from_best(network, prompt(length, length), found) < NEAR_TIE


@pytest.mark.parametrize("grid", [Grid(8, 0), Grid(4, 32), Grid(4, 64)])
@pytest.mark.parametrize("biases", [False, True])
def test_integers_answer_as_what_they_stand_for(tmp_path: Path, grid: Grid, biases: bool) -> None:
    variant = made(tmp_path / "v", llama.shape(qkv_bias=biases, output_bias=biases, mlp_bias=biases), grid)
    with opened(variant, tmp_path, **PLAIN) as session:
        found = ids(session.submit(Request(0, prompt(20), 30)))
        assert session.kernel == ("int8 per channel" if grid.bits == 8 else f"int4 group {grid.group_size}")
    assert len(set(found)) > 3
    assert far_from_best(load_network(variant).eval(), prompt(20), found) < NEAR_TIE


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("gemma3-scores-scaled-otherwise", None),
        pytest.param("llama-biases", Grid(4, 32), marks=pytest.mark.slow),
        pytest.param("qwen3", Grid(8, 0), marks=pytest.mark.slow),
    ],
)
def test_compiled_it_answers_as_uncompiled_and_finds_what_it_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, grid: Grid | None
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    variant = made(tmp_path / "v", llama.CASES[name], grid)
    requests = [Request(i, prompt(length, length), 20) for i, length in enumerate((1, 15, 16, 17, 45))]
    with opened(variant, tmp_path / "cache", **PLAIN, chunks=[16]) as session:
        expected = [ids(session.submit(request)) for request in requests]
        assert session.compile_seconds == 0
    built: list[set[Path]] = []
    for _ in range(2):
        with opened(variant, tmp_path / "cache", **EXACT, chunks=[16]) as session:
            assert [ids(session.submit(request)) for request in requests] == expected
            assert session.compile_seconds > 0.1
            assert session.kernel.endswith(", compiled")
        built.append(set((tmp_path / "cache" / "compiled").rglob("*.so")))
    assert built[0] == built[1] != set()
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").rglob("*.so"))


@pytest.mark.parametrize("weights", [Dtype.auto, Dtype.float32])
@pytest.mark.parametrize("kv_cache", [Dtype.auto, Dtype.bfloat16, Dtype.float32])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_every_precision_generates_and_costs_the_bytes_it_says(
    tmp_path: Path, weights: Dtype, kv_cache: Dtype, grid: Grid | None
) -> None:
    variant = made(tmp_path / "v", llama.shape(), grid)
    config = llama.shape(tied_head=grid is None)
    used = Dtype.bfloat16 if weights is Dtype.auto else weights
    size, kv_size = (4 if kind is Dtype.float32 else 2 for kind in (used, used if kv_cache is Dtype.auto else kv_cache))
    cost = cost_of(config)
    types = {"weight_dtype": weights, "activation_dtype": used, "kv_cache_dtype": kv_cache}
    with opened(variant, tmp_path, **{**PLAIN, **types}) as session:
        assert len(ids(session.submit(Request(0, prompt(20), 6)))) == 6
        assert session.arithmetic == used.name
        assert session.kv_bytes_per_position == cost.kv_bytes(1, kv_size)
        assert session.memory()["kv_cache"] == cost.kv_bytes(96 + 16, kv_size)  # a chunk may end beyond the context
        held, read = session.memory()["weights"], session.weight_bytes_per_token
    embedding = 0 if grid is None else (config.vocab_size - 1) * config.hidden_size * size
    assert held is not None
    assert held - read == embedding
    if grid is None:
        assert held == cost.parameters * size
    else:
        matrices = [*cost.matrices, cost.head]
        scales = (2 if grid.bits == 4 else 1) * size  # int4: beside each scale lies a zero
        integers = sum(
            m.weights * grid.bits // 8 + m.rows * m.count * grid.groups(m.columns) * scales for m in matrices
        )
        assert held == integers + (cost.vector_parameters + cost.embedding.weights) * size


def test_the_cache_may_be_narrower_than_the_arithmetic(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    with opened(variant, tmp_path, **PLAIN, kv_cache_dtype=Dtype.bfloat16) as session:
        found = ids(session.submit(Request(0, prompt(30), 20)))
        assert session.network.blocks()[0].keys.dtype is torch.bfloat16
    assert 0 < far_from_best(load_network(variant).eval(), prompt(30), found) + 1e-9 < 1


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_logits_that_are_not_finite_are_an_error_and_leave_nothing_behind(tmp_path: Path, grid: Grid | None) -> None:
    """Nor does rounding hide them."""
    variant = made(tmp_path / "v", llama.shape(), grid)
    with opened(variant, tmp_path, **{**PLAIN, "activation_dtype": Dtype.auto}) as session:
        expected = ids(session.submit(Request(0, prompt(9), 12)))
        weight = session.network.blocks()[0].before_attention.weight
        kept = weight.clone()
        weight.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="request 3: the logits are not finite after 0 tokens"):
            list(session.submit(Request(3, prompt(40), 5, verify=True)))
        weight.copy_(kept)
        assert ids(session.submit(Request(0, prompt(9), 12))) == expected


def test_a_cancelled_prompt_is_not_read_to_its_end(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    flight = Flight(Request(0, prompt(40), 5))
    with opened(variant, tmp_path, **PLAIN, chunks=[4]) as session:
        sizes, read = [], session.read[4]

        def counted(ids: torch.Tensor, at: torch.Tensor, places: torch.Tensor) -> Any:
            sizes.append(len(ids))
            flight.cancelled = len(sizes) == 3
            return read(ids, at, places)

        session.read[4] = counted
        assert session._prompt(flight) is None
        assert sizes == [4, 4, 4]


def test_grids_without_a_kernel_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Compiled(**PLAIN)
    groups = "torch's int4 kernel has groups of 32, 64, 128, 256: group_size must be one of them, got"
    assert unsupported(Grid(8, 32)) == "torch's int8 kernel has one scale per row: group_size must be 0, got 32"
    assert unsupported(Grid(4, 0)) == f"{groups} 0"
    assert unsupported(Grid(4, 16)) == f"{groups} 16"
    packed = "group_size must be 0 or a multiple of 32, got 16"
    assert unsupported(Grid(8, 16), Product.packed) == unsupported(Grid(4, 16), Product.packed) == packed
    assert not unsupported(Grid(8, 96), Product.packed)
    variant = made(tmp_path / "v", llama.shape(), Grid(8, 32))
    with pytest.raises(UserError, match="compiled cannot run v: torch's int8 kernel has one scale per row"):
        engine.load(variant, tmp_path)
    fits = made(tmp_path / "w", llama.shape(), Grid(4, 32))
    on_cuda = Compiled(devices=["cuda:0"]).supports(fits)
    assert on_cuda.reason == "the kernels for integers are the CPU's: devices must be [cpu], got ['cuda:0']"
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "engine compiled needs a C++ compiler (g++, or the one that CXX names)"
    assert Compiled(**EXACT).supports(fits).reason == reason
    assert engine.supports(fits)  # Python needs none


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "model.safetensors lacks model.layers.1.mlp.down_proj.weight"),
        (
            torch.zeros(3, 3),
            r"tensor model.layers.1.mlp.down_proj.weight must be \(64, 128\) by config.json, got \(3, 3\)",
        ),
        (torch.full((64, 128), torch.nan), "tensor model.layers.1.mlp.down_proj.weight holds NaN or infinite values"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_one_sentence(
    tmp_path: Path, change: torch.Tensor | None, words: str
) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    broken = llama.rewrite(variant, {"model.layers.1.mlp.down_proj.weight": change})
    with pytest.raises(UserError, match=words):
        Compiled(**PLAIN).load(broken, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["tpu"]}, r"engine.devices must be one of \[cpu\], \[cuda:0\], got \['tpu'\]"),
        (
            {"weight_dtype": Dtype.bfloat16, "activation_dtype": Dtype.float32},
            "activation_dtype must be auto or bfloat16 .* got float32",
        ),
        ({"weight_dtype": Dtype.float16}, "must be bfloat16 or float32 on a CPU, got float16"),
        ({"kv_cache_dtype": Dtype.float16}, "must be bfloat16 or float32 on a CPU, got float16"),
        ({"chunks": []}, r"engine.chunks must be sizes of at least 2 in ascending order, got \[\]"),
        ({"chunks": [1, 16]}, r"engine.chunks must be sizes of at least 2 in ascending order, got \[1, 16\]"),
        ({"chunks": [64, 16]}, r"engine.chunks must be sizes of at least 2 in ascending order, got \[64, 16\]"),
        ({"chunks": [16, 5000]}, "engine.chunks must be at most 4096, got 5000"),
    ],
)
def test_options_that_it_cannot_honour_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Compiled(**options)


def test_what_is_used_is_recorded() -> None:
    used = Compiled(devices=["cuda:0"], weight_dtype=Dtype.float16, chunks=[8]).describe()
    names = ("weight_dtype", "activation_dtype", "kv_cache_dtype", "chunks", "compile")
    assert [used[name] for name in names] == ["float16", "float16", "float16", [8], True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test must lack")
def test_a_device_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    with pytest.raises(UserError, match=r"engine\.devices asks for cuda:0, this machine has no CUDA device"):
        Compiled(devices=["cuda:0"]).load(variant, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs can only be replayed on one")
@pytest.mark.parametrize("weights", [Dtype.float32, Dtype.float16, Dtype.bfloat16])
def test_on_cuda_it_answers_as_the_network_does(tmp_path: Path, weights: Dtype) -> None:
    variant = llama.variant(tmp_path / "v", llama.CASES["gemma3"])
    with opened(variant, tmp_path, max_context=96, weight_dtype=weights, devices=["cuda:0"]) as session:
        for length in (1, 16, 45):
            found = ids(session.submit(Request(0, prompt(length, length), 20)))
            far = far_from_best(load_network(variant).eval(), prompt(length, length), found)
            assert far < (NEAR_TIE if weights is Dtype.float32 else 1)
