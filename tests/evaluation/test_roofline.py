from __future__ import annotations

import json
from typing import Any

import pytest

from hasten.artifacts import Json
from hasten.evaluation.roofline import Work, decoding, nothing, phase, prefilling, roofline
from hasten.model.config import ModelConfig
from hasten.model.cost import Cost, cost_of
from hasten.model.layout import Format
from tests.tiny import lstm_shape, shape

CEILINGS: Json = {
    "read_bytes_per_second": [
        {"working_set_bytes": 2**20, "bytes_per_second": 1e11},
        {"working_set_bytes": 2**30, "bytes_per_second": 1e10},
    ],
    "cache_bytes_per_second": 1e11,
    "dram_bytes_per_second": 1e10,
    "matmul_flops_per_second": {"float32": 1e12, "float16": None},
    "validity": "valid",
    "date": "2026-11-23",
    "why": {"matmul_flops_per_second.float16": "torch.mm has no kernel"},
}
FLAT = {**CEILINGS, "read_bytes_per_second": [{"working_set_bytes": 1, "bytes_per_second": 1e10}]}


def work(config: ModelConfig | None = None, **changes: Any) -> Work:
    fields = {"weight_bytes_per_token": 10_000_000, "kv_bytes_per_position": 1000, "arithmetic": "float32"}
    return Work(config or shape(), **{**fields, **changes})


def entry(**changes: Any) -> Json:
    options = {"prompt_tokens": 128, "output_tokens": 64}
    return {"ttft_seconds_p50": 0.02, "tpot_seconds_p50": 0.002, "options": options, **changes}


def test_decoding_reads_the_weights_and_the_keys_and_values_of_the_mean_position() -> None:
    found = decoding(work(), 100, 41, 0.002, FLAT)
    positions = [100 + k for k in range(1, 41)]  # what the tokens after the first attend to
    mean = sum(positions) / len(positions)
    assert found["bytes"] == 10_000_000 + 1000 * mean
    assert found["flops"] == sum(Cost(shape()).decode_flops(p) for p in positions) / len(positions)
    assert found["memory_seconds"] == pytest.approx(found["bytes"] / 1e10)
    assert found["mbu"] == pytest.approx(found["bytes"] / 0.002 / 1e10)
    assert found["mfu"] == pytest.approx(found["flops"] / 0.002 / 1e12)


def test_tokens_of_one_pass_share_what_it_reads_and_what_a_draft_read_for_it() -> None:
    drafted = work(weight_bytes_per_guess=1_000_000)
    qa = entry(tokens_per_pass=2.5, guesses_per_pass=3.0)
    decode = roofline(drafted, {"qa": qa}, CEILINGS)["roofline"]["qa"]["decode"]
    alone = roofline(work(), {"qa": entry()}, CEILINGS)["roofline"]["qa"]["decode"]
    assert decode["bytes"] == pytest.approx((alone["bytes"] + 3_000_000) / 2.5, abs=1)
    assert decode["working_set_bytes"] == alone["working_set_bytes"] + 1_000_000  # both models, over and over
    assert decode["flops"] == alone["flops"]  # what the tokens need, not what wrong guesses cost
    assert decode["mbu"] == pytest.approx(decode["memory_seconds"] / 0.002)
    unguessed = entry(tokens_per_pass=None, guesses_per_pass=None)
    assert roofline(work(), {"qa": unguessed}, CEILINGS)["roofline"]["qa"]["decode"] == alone


def test_a_sliding_layer_reads_its_window_of_the_context_and_computes_no_more() -> None:
    config = shape(sliding_window=8, tied_head=False)  # both layers slide
    found = decoding(work(config), 100, 41, 0.002, FLAT)
    assert found["bytes"] == 10_000_000 + 1000 * 8
    assert found["flops"] == Cost(config).decode_flops(8)
    entering = decoding(work(config), 4, 8, 0.002, FLAT)  # positions 5 to 11
    assert entering["bytes"] == round(10_000_000 + 1000 * (5 + 6 + 7 + 4 * 8) / 7)
    assert prefilling(work(config), 128, 0.02, FLAT)["bytes"] == 10_000_000 + 128_000  # it writes them all


def test_a_shape_that_is_not_known_reads_every_position() -> None:
    found = decoding(Work(None, 1000, 10, "float32"), 100, 41, 0.002, FLAT)
    assert (found["bytes"], found["flops"]) == (1000 + 1205, None)


def test_mbu_is_the_definition_whatever_the_bandwidth_at_that_working_set() -> None:
    found = decoding(work(weight_bytes_per_token=2**25, kv_bytes_per_position=0), 1, 2, 0.005, CEILINGS)
    assert found["mbu"] == pytest.approx(2**25 / 0.005 / 10**10.5)  # half way between the two measured ones


def test_a_prefill_reads_the_weights_once_and_computes_logits_once() -> None:
    found = prefilling(work(), 128, 0.02, FLAT)
    assert found["bytes"] == 10_000_000 + 128_000
    assert found["flops"] == Cost(shape()).prefill_flops(128, logits=1)


def test_a_prefill_of_an_lstm_reads_the_encoder_too_in_the_sessions_format() -> None:
    cost = cost_of(lstm_shape())
    held = Format.floats(2)
    session = Work(lstm_shape(), cost.weight_bytes_per_token(held), 0, "bfloat16")
    assert prefilling(session, 16, 0.02, FLAT)["bytes"] == cost.prefill_weight_bytes(held)
    assert decoding(session, 16, 8, 0.02, FLAT)["bytes"] == cost.weight_bytes_per_token(held)


@pytest.mark.parametrize(
    ("megabytes", "gigaflops", "seconds", "bound", "share", "words"),
    [
        (10, 0.1, 0.00125, "memory", 0.8,
         "x is memory-bound: 80% of the 10 GB/s this machine reads at 10 MB; at the limit it would be 1.25x faster"),
        (10, 8, 0.01, "compute", 0.8,
         "x is compute-bound: 80% of the 1 TFLOP/s this machine multiplies in float32; "
         "at the limit it would be 1.25x faster"),
        (10, 1, 0.004, "overhead", 0.25,
         "x is overhead-bound: reading explains 25% of its time and arithmetic 25%; "
         "at the limit it would be 4x faster"),
        (10, 0.1, 0.002, "memory", 0.5,
         "x is memory-bound: 50% of the 10 GB/s this machine reads at 10 MB; at the limit it would be 2x faster"),
        (10, 0.1, 0.00095, "memory", 1 / 0.95, "x is memory-bound: 105% of the 10 GB/s this machine reads at 10 MB"),
        (12, 0.1, 0.001, "memory", 1.2,
         "x is memory-bound: 120% of the 10 GB/s this machine reads at 12 MB; no engine can do that, so the ceiling is "
         "too low: measure it again with pipelines/ceilings.py again=true"),
    ],
)  # fmt: skip
def test_the_nearer_limit_binds_if_it_explains_half_of_the_time(
    megabytes: float, gigaflops: float, seconds: float, bound: str, share: float, words: str
) -> None:
    found = phase("x", megabytes * 1e6, round(gigaflops * 1e9), seconds, "float32", FLAT)
    assert (found["bound"], found["why"]) == (bound, words)
    assert found["share"] == pytest.approx(share)  # never clipped


def test_without_a_rate_memory_may_still_bind_and_else_nothing_is_claimed() -> None:
    near = phase("x", 10e6, 10**9, 0.00125, "float16", FLAT)
    assert (near["bound"], near["mfu"], near["compute_seconds"]) == ("memory", None, None)
    far = phase("x", 10e6, 10**9, 0.01, "float16", FLAT)
    assert far["bound"] is None
    assert far["why"] == "what binds x is not known: reading explains 10% of its time, and torch.mm has no kernel"
    other = phase("x", 10e6, 10**9, 0.01, "int4", FLAT)
    assert other["why"].endswith("and no ceiling is known for int4")
    uncounted = phase("x", 10e6, None, 0.01, "float32", FLAT)
    assert uncounted["why"].endswith("and its FLOPs are not counted")


def test_a_measurement_gets_the_first_scenarios_figures_and_every_scenarios_phases() -> None:
    found = roofline(work(), {"qa": entry(), "slow": entry(tpot_seconds_p50=0.2)}, CEILINGS)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    qa = found["roofline"]["qa"]
    assert (found["mbu"], found["bound"], found["mfu"]) == (
        qa["decode"]["mbu"],
        qa["decode"]["bound"],
        qa["prefill"]["mfu"],
    )
    assert found["roofline"]["slow"]["decode"]["mbu"] == pytest.approx(qa["decode"]["mbu"] / 100)
    assert found["why"] == {}
    assert qa["why"] == f"{qa['decode']['why']}. P{qa['prefill']['why'][1:]}."
    ceilings = found["ceilings"]
    assert ceilings["working_set_bytes"] == qa["decode"]["bytes"]
    assert qa["decode"]["memory_seconds"] == pytest.approx(qa["decode"]["bytes"] / ceilings["read_bytes_per_second"])
    assert (ceilings["cache_read_bytes_per_second"], ceilings["dram_read_bytes_per_second"]) == (1e11, 1e10)
    assert (ceilings["matmul_flops_per_second"], ceilings["arithmetic"]) == (1e12, "float32")
    assert (ceilings["validity"], ceilings["date"]) == ("valid", "2026-11-23")


def test_what_is_null_has_its_reason() -> None:
    found = roofline(work(arithmetic="float16"), {"qa": entry(tpot_seconds_p50=1.0)}, CEILINGS)
    assert (found["mfu"], found["bound"]) == (None, None)
    assert found["why"].keys() == {"mfu", "bound"}
    assert "torch.mm has no kernel" in found["why"]["mfu"]
    uncounted = roofline(Work(None, 1000, 10, "float32"), {"qa": entry()}, CEILINGS)
    assert "its FLOPs are not counted" in uncounted["why"]["mfu"]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"tpot_seconds_p50": None}, "the scenario has no tpot_seconds_p50"),
        ({"options": {}}, "the scenario has no fixed lengths"),
    ],
)
def test_a_scenario_that_times_no_single_request_is_passed_over(figures: Json, words: str) -> None:
    found = roofline(work(), {"other": entry(**figures), "qa": entry()}, CEILINGS)
    assert found["roofline"]["other"] == {"why": words}
    assert found["mbu"] == found["roofline"]["qa"]["decode"]["mbu"]
    alone = roofline(work(), {"other": entry(**figures)}, CEILINGS)
    assert alone == nothing("no scenario timed single requests")


def test_nothing_known_is_null_with_the_same_keys_and_one_reason() -> None:
    found = nothing("the trial failed")
    assert found.keys() == roofline(work(), {"qa": entry()}, CEILINGS).keys()
    assert found["roofline"] == {}
    assert found["why"] == dict.fromkeys(("ceilings", "mbu", "mfu", "bound"), "the trial failed")
