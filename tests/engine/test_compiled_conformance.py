"""The shared suite again for `compiled` as people run it: compiled, and in each format it has kernels for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.engine.base import Dtype, Request, Session
from hasten.engine.compiled import VNNI, CompiledSession
from hasten.engine.compiled.kernels import Product
from hasten.engine.streaming import Flight
from hasten.hardware import cpu_flags
from hasten.model.network import Network
from tests.engine import test_conformance as shared
from tests.engine.engines import opened
from tests.engine.shelf import Shelf

pytestmark = pytest.mark.slow  # each format compiles


@dataclass(frozen=True)
class Format:
    """kernel, arithmetic: as the session says. near_tie: two logits closer than this may change places."""

    dtype: Dtype
    kernel: str
    arithmetic: str
    near_tie: float
    grid: tuple[int, int] = (0, 0)
    rounds: bool = False


FLOAT, HALF = Dtype.float32, Dtype.bfloat16
FORMATS = {
    "float32": Format(FLOAT, "float32", "float32", shared.NEAR_TIE),
    "bfloat16": Format(HALF, "bfloat16", "bfloat16", 0.15),
    "int8": Format(HALF, "int8 per channel", "bfloat16", 0.15, (8, 0)),
    "int8-rounded": Format(HALF, f"int8 per channel, {Product.rounded.value}", "int8", 0.5, (8, 0), rounds=True),
    "int4": Format(HALF, "int4 group 32", "bfloat16", 0.15, (4, 32)),
    "int4-rounded": Format(HALF, f"int4 group 32, {Product.packed.value}", "int8", 0.5, (4, 32), rounds=True),
}


@pytest.fixture(scope="module", params=FORMATS)
def form(request: pytest.FixtureRequest) -> Format:
    found = FORMATS[request.param]
    if found.rounds and VNNI.isdisjoint(cpu_flags()):
        pytest.skip("this processor has no VNNI, so nothing is rounded")
    return found


@pytest.fixture(scope="module")
def variant(shelf: Shelf, form: Format) -> Variant:
    return shelf.variant("llama", *form.grid)


@pytest.fixture(scope="module")
def network(shelf: Shelf, variant: Variant) -> Network:
    return shelf.network(variant)


@pytest.fixture(scope="module")
def near_tie(form: Format) -> float:
    return form.near_tie


@pytest.fixture(scope="module")
def session(form: Format, variant: Variant, cache: Path) -> Iterator[Session]:
    types: dict[str, Any] = {"weight_dtype": form.dtype, "kv_cache_dtype": form.dtype}
    types["activation_dtype"] = Dtype.auto if form.rounds else form.dtype
    with opened("compiled", variant, cache, compile=True, **types) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def logits(session: CompiledSession) -> shared.Logits:
    """Its own, as rounding moves what lies at a nucleus' edge; by how much they may differ is said by `near_tie`."""

    def behind(asked: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            found = session._prompt(Flight(Request(0, asked, 1)))
        assert found is not None
        return found[1].clone()

    return lambda asked: session._worker.submit(behind, asked).result()


def test_the_format_that_runs_is_recorded(session: Session, form: Format) -> None:
    assert session.kernel.startswith(form.kernel)
    assert session.kernel.endswith(", compiled")
    assert session.arithmetic == form.arithmetic


globals().update(
    {
        test.__name__: test
        for test in (
            shared.test_greedy_answers_are_the_networks,
            shared.test_every_token_comes_in_order_with_its_request_and_its_time,
            shared.test_a_stop_is_yielded_last_and_without_one_the_length_is_exact,
            shared.test_a_request_may_fill_the_context_and_not_a_token_more,
            shared.test_tokens_that_are_pieces_of_a_character_come_one_by_one,
            shared.test_closing_a_stream_cancels_and_the_next_answer_is_right,
            shared.test_two_hundred_requests_leave_no_memory_behind,
            shared.test_the_same_seed_draws_the_same_tokens_and_another_one_others,
            shared.test_tokens_are_drawn_as_often_as_they_are_probable,
        )
    }
)
"""All that ask one session; the others, by engine's name, are about loading and do not depend on the format."""
