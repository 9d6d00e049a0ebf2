"""What only the engine `native` has; the rest is in `test_conformance` and `test_parity`."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hasten.artifacts import Variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Dtype, Request, Token
from hasten.engine.native import Native, NativeSession
from hasten.engine.native import build as kernels
from hasten.errors import UserError
from hasten.hardware import cpu_flags
from hasten.model.huggingface import load_network, save_checkpoint
from tests.engine import llama
from tests.engine.llama import far_from_best, ids, prompt

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="needs a C++ compiler")
EXACT = {
    "threads": 2,
    "weight_dtype": Dtype.float32,
    "activation_dtype": Dtype.float32,
    "kv_cache_dtype": Dtype.float32,
    "max_context": 256,
}


def session(variant: Variant, cache: Path, **options: Any) -> closing[NativeSession]:
    return closing(Native(**{**EXACT, **options}).load(variant, cache))


def quantised(variant: Variant, bits: int, group_size: int, name: str = "") -> Variant:
    made = Rtn(bits=bits, group_size=group_size).compress(variant, None, 0)
    assert made.grid is not None
    folder = variant.path.with_name(name or f"int{bits}-{group_size}")
    manifest = {**variant.manifest, "name": folder.name, "grid": made.grid.describe()}
    save_checkpoint(folder, made.config, made.tensors, variant.path, manifest)
    return Variant(folder)


@pytest.mark.skipif("avx512f" not in cpu_flags(), reason="the portable kernels are the ones that all tests use")
def test_a_processor_without_the_instructions_computes_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    cases = [(variant, EXACT), (quantised(variant, 8, 32), {}), (quantised(variant, 4, 64), {})]
    answers: list[list[int]] = []
    for lacking in ("", "-mno-avx512f"):
        monkeypatch.setenv("CXXFLAGS", lacking)
        for one, options in cases:
            with closing(
                Native(**{"max_context": 256, "kv_cache_dtype": Dtype.float32, **options}).load(one, cache)
            ) as engine:
                assert engine.kernel.endswith("(portable)") == bool(lacking)
                answers.append([ids(engine.submit(Request(i, prompt(20, i), 1)))[0] for i in range(20)])
    for fast, portable in zip(answers[:3], answers[3:], strict=True):
        assert sum(a == b for a, b in zip(fast, portable, strict=True)) >= 19  # a near tie may fall otherwise


@pytest.mark.parametrize("kv_cache", [Dtype.float16, Dtype.float32])
def test_bfloat16_weights_and_a_half_cache_are_close(tmp_path: Path, cache: Path, kv_cache: Dtype) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    model = load_network(variant).eval()
    options = {"weight_dtype": Dtype.bfloat16, "activation_dtype": Dtype.auto, "kv_cache_dtype": kv_cache}
    with session(variant, cache, **options) as engine:
        worst = [far_from_best(model, p, ids(engine.submit(Request(0, p, 1)))) for p in map(prompt, range(20, 40))]
    assert sum(one == 0 for one in worst) >= 16
    assert max(worst) < 0.5


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_guesses_change_how_long_it_takes_and_not_a_token(tmp_path: Path, cache: Path, temperature: float) -> None:
    """A prompt that repeats itself, so that some guesses are right."""
    variant = quantised(llama.variant(tmp_path / "v", llama.shape()), 4, 32)
    asked = prompt(6) * 5
    requests = [Request(i, asked[i:], 60, temperature=temperature, seed=i) for i in range(4)]
    answers = []
    for guesses in (0, 1, 7):
        with session(variant, cache, activation_dtype=Dtype.auto, slots=2, guesses=guesses) as engine:
            answers.append([ids(stream) for stream in [engine.submit(request) for request in requests]])
            guessed, right = engine.guessed()
        assert (guessed > right > 0) if guesses else guessed == 0
    assert answers[0] == answers[1] == answers[2]
    assert all(len(answer) == 60 for answer in answers[0])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[NativeSession]:
    with session(llama.variant(tmp_path_factory.mktemp("variant") / "v", llama.shape()), cache) as one:
        yield one


def test_the_session_says_what_it_runs_and_what_it_holds(loaded: NativeSession) -> None:
    config = llama.shape()
    matrices = sum(v.numel() * 4 for v in llama.random_tensors(config).values() if v.dim() == 2)
    assert loaded.kernel.startswith("float32 (")
    assert loaded.weight_bytes_per_token == matrices
    kv = 2 * config.layers * config.kv_heads * config.head_width * 256 * 4
    assert loaded.memory() == {"weights": matrices, "kv_cache": kv}
    assert loaded.kv_bytes_per_position * 256 == kv


def test_longer_groups_are_fewer_bytes(tmp_path: Path, cache: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape(tied_head=False))
    sizes = []
    for group_size in (32, 64):
        with session(quantised(variant, 4, group_size), cache) as engine:
            sizes.append(engine.weight_bytes_per_token)
    assert sizes[1] < sizes[0]


def test_the_build_is_kept_and_another_dtype_is_another_one(tmp_path: Path, cache: Path) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    low, full = (Native(weight_dtype=dtype).build(variant, tmp_path) for dtype in (Dtype.auto, Dtype.float32))
    assert (low / "weights.bin").stat().st_size < (full / "weights.bin").stat().st_size
    before = (full / "weights.bin").stat().st_mtime_ns
    assert Native(weight_dtype=Dtype.float32).build(variant, tmp_path) == full
    assert (full / "weights.bin").stat().st_mtime_ns == before


def test_the_compiler_is_part_of_what_decides_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Native.versions()["compiler"]
    assert found is not None
    assert re.search(r"\d+\.\d+", found)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert Native.versions() == {"compiler": None}


def test_a_compiler_that_is_missing_or_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = llama.variant(tmp_path / "v", llama.shape())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="CXX must name a C\\+\\+ compiler that runs, got no-such-compiler"):
        Native().load(variant, tmp_path / "cache")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "needs a C++ compiler" in str(Native().supports(variant).reason)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": ["cuda:0"]}, r"devices must be \[cpu\] for native"),
        ({"weight_dtype": Dtype.float16}, "weight_dtype must be auto, bfloat16 or float32 for native, got float16"),
        ({"activation_dtype": Dtype.float16}, "activation_dtype must be auto or float32 for native, got float16"),
        ({"kv_cache_dtype": Dtype.bfloat16}, "kv_cache_dtype must be auto, float16, float32 or int8 for native"),
        ({"slots": 0}, "slots must be 1 to 256, got 0"),
        ({"guesses": -1}, r"guesses must be 0 to micro_batch - 1 \(255\), got -1"),
        ({"draft": "shallow"}, "guesses must be at least 1 with engine.draft, got 0"),
        ({"draft": "../v", "guesses": 2}, r"draft must be empty or a variant's name \(letters, .*\), got '../v'"),
        ({"slots": 8, "micro_batch": 4}, r"micro_batch must be slots \(8\) to 4096, got 4"),
    ],
)
def test_options_are_checked_at_the_door(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Native(**options)


def test_closing_waits_for_a_reader_that_is_in_the_server(tmp_path: Path, cache: Path) -> None:
    """A server that is freed under a reader would be read all the same."""
    order: list[str] = []
    tokens: list[Token] = []
    entered, leave = threading.Event(), threading.Event()
    engine = Native(**EXACT).load(llama.variant(tmp_path / "v", llama.shape()), cache)
    functions = engine.functions

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(functions, name)

        def hasten_poll(self, *arguments: Any) -> Any:
            entered.set()
            assert leave.wait(60)
            order.append("read")
            return functions.hasten_poll(*arguments)

        def hasten_close(self, server: Any) -> None:
            order.append("closed")
            functions.hasten_close(server)

    engine.functions = Watched()
    stream = engine.submit(Request(0, prompt(4), 250))
    reader = threading.Thread(target=lambda: tokens.extend(stream))
    closer = threading.Thread(target=engine.close)
    reader.start()
    assert entered.wait(60)
    closer.start()
    closer.join(0.3)
    assert closer.is_alive() and not order
    leave.set()
    for thread in (reader, closer):
        thread.join(60)
        assert not thread.is_alive()
    assert order == ["read", "closed"]
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(1, prompt(4), 1))
