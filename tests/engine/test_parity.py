"""Our own graphs and kernels against our own network: every family and every grid, alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.engine.base import Dtype, Request
from hasten.engine.onnxruntime import OnnxruntimeSession
from tests.engine import llama
from tests.engine.engines import ENGINES, NEAR_TIE, OWN, engine, opened
from tests.engine.llama import far_from_best, ids, prompt
from tests.engine.shelf import Shelf

TOKENS = 24
FAMILIES = [*llama.CASES, "mistral-slides"]
GRIDS = [(8, 0), (8, 32), (8, 64), (4, 0), (4, 32), (4, 64)]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_equal_our_network(shelf: Shelf, cache: Path, name: str, family: str) -> None:
    variant = shelf.variant(family)
    if not (support := engine(name).supports(variant)):
        assert (name, family) == ("onnxruntime", "mistral-slides"), support.reason
        variant = shelf.variant("mistral-slides-wide")
    model = shelf.network(variant)
    with opened(name, variant, cache, micro_batch=32) as session:
        for seed, length in enumerate((1, 9, 40, 100)):
            asked = prompt(length, seed)
            found = ids(session.submit(Request(seed, asked, TOKENS)))
            assert far_from_best(model, asked, found) < NEAR_TIE
        assert len(set(found)) > 4  # a model that repeats itself would prove little
        if isinstance(session, OnnxruntimeSession):
            with torch.inference_mode():
                expected = model(torch.tensor([asked]))[0]
            for start, end in ((0, 7), (7, 8), (8, 50), (50, 100)):
                logits = session.model.logits([asked[start:end]], [start])[0]
                assert torch.allclose(logits, expected[end - 1], rtol=1e-3, atol=1e-3)
    if name == "native":  # which shares out rows and heads by itself
        with opened(name, variant, cache, threads=2) as session:
            assert ids(session.submit(Request(0, asked, 6))) == found[:6]


@pytest.mark.parametrize(
    ("name", "bits", "group_size"), [(name, *grid) for name in OWN for grid in GRIDS] + [("onnxruntime", 4, 16)]
)
@pytest.mark.parametrize("family", ["llama-biases", "gemma3-short"])
def test_integers_are_multiplied_as_they_are(
    shelf: Shelf, cache: Path, name: str, family: str, bits: int, group_size: int
) -> None:
    variant = shelf.variant(family, bits, group_size)
    model = shelf.network(variant)
    prompts = [prompt(20, seed) for seed in range(20)]
    kernel = ENGINES[name].integers.format(bits=bits)
    with opened(name, variant, cache) as exact:
        assert exact.arithmetic == "float32"
        assert exact.kernel.startswith(kernel) == engine(name).supports(variant).native
        for asked in prompts[:3]:
            assert far_from_best(model, asked, ids(exact.submit(Request(0, asked, TOKENS)))) < NEAR_TIE
    with opened(name, variant, cache, activation_dtype=Dtype.auto, threads=2) as session:
        assert session.arithmetic == "int8"
        assert session.kernel.startswith(kernel)
        streams = [session.submit(Request(i, asked, 1)) for i, asked in enumerate(prompts)]
        firsts = [ids(stream) for stream in streams]
    # Activations are rounded to 8 bits on the way, so near ties may fall otherwise.
    assert sum(far_from_best(model, *pair) == 0 for pair in zip(prompts, firsts, strict=True)) >= 16
