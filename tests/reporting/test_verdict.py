"""The verdict names a champion only on evidence, and says why everything else lost."""

from __future__ import annotations

import json

import pytest

from hasten.reporting.verdict import p_value, points_of
from tests.reporting.conftest import Study, run
from tests.study import STUDY

CRASH = {"status": "failed", "error": "the process crashed (SIGSEGV)"}


def test_the_champion_is_the_fastest_that_is_proven(study: Study) -> None:
    entry = study.entry
    assert study.finalists["scenarios"]["qa"]["finalists"] == ["depth-int8@llamacpp", "int8@llamacpp"]
    assert (entry["champion"], entry["reference"]) == ("int8@llamacpp", "baseline@llamacpp")
    assert entry["decision"] == "non-inferior"
    assert entry["speedup"]["ci95"][0] < entry["speedup"]["ratio"] < entry["speedup"]["ci95"][1]
    assert entry["accuracy_difference"]["p_holm"] < 0.025
    assert entry["rejected"]["depth-int8@llamacpp"].startswith("inferior in zh at 3 points: -5.5 points [")


def test_the_sentence_says_it_all(study: Study) -> None:
    assert study.entry["sentence"].startswith("variant int8 on engine llamacpp: 2.26x [2.")
    assert "faster for real-time QA than variant baseline on engine llamacpp" in study.entry["sentence"]
    assert "accuracy non-inferior at 2 points (" in study.entry["sentence"]
    assert study.entry["sentence"].endswith("n = 2,400)")


def test_everything_but_champion_and_reference_has_a_reason(study: Study) -> None:
    named = {study.entry["champion"], study.entry["reference"], *study.entry["rejected"]}
    assert named == {made.trial for made in STUDY}


def test_the_frontier_is_listed_fastest_first(study: Study) -> None:
    latencies = [point["latency_seconds_p50"] for point in study.entry["frontier"]]
    accuracies = [point["accuracy"] for point in study.entry["frontier"]]
    assert latencies == sorted(latencies) and accuracies == sorted(accuracies) and len(latencies) > 2


def test_it_is_json_and_the_same_every_time(study: Study) -> None:
    assert json.dumps(study.verdict, allow_nan=False) == json.dumps(run().verdict, allow_nan=False)


def test_the_machine_lists_the_libraries_of_every_engine(study: Study) -> None:
    assert set(study.verdict["machine"]["libraries"]) == {"torch", "xllamacpp"}


def test_undecided_keeps_the_reference_and_says_how_many_items_would_decide(kept: Study) -> None:
    entry = kept.entry
    assert entry["champion"] == entry["reference"] and entry["decision"] == "undecided"
    assert "faster but its accuracy is undecided" in entry["sentence"]
    assert entry["needs_items"] > 0 and f"about {entry['needs_items']:,} more test items" in entry["sentence"]
    assert entry["speedup"]["ratio"] == 1.0 and entry["accuracy_difference"]["points"] == 0.0
    # The finalist to speak of is the one that is closest to a decision.
    needs = [row["needs_items"] for row in entry["confirmed"].values() if row["decision"] == "undecided"]
    assert entry["needs_items"] == min(needs)


def test_no_faster_variant_keeps_the_reference() -> None:
    entry = run(STUDY[:2]).entry
    assert entry["champion"] == "baseline@llamacpp" and entry["decision"] is None
    assert entry["sentence"].endswith("no variant that may still answer right is faster")


def test_without_a_baseline_there_is_no_verdict(baseless: Study) -> None:
    assert baseless.entry["champion"] is None
    assert baseless.entry["sentence"].startswith("no verdict for real-time QA: no trial of the float baseline")


def test_a_reference_that_crashes_gives_no_verdict() -> None:
    entry = run(items=60, baseline=CRASH).entry
    assert entry["champion"] is None and "SIGSEGV" in entry["sentence"]


def test_a_finalist_that_crashes_is_rejected_and_the_next_is_taken() -> None:
    entry = run(**{"depth-int8": CRASH}).entry
    assert entry["champion"] == "int8@llamacpp"
    assert entry["rejected"]["depth-int8@llamacpp"] == "failed in confirmation: the process crashed (SIGSEGV)"


def test_a_finalist_that_is_not_faster_after_all_is_no_champion() -> None:
    entry = run(int8={"rounds": [[[0.12, 0.13, 0.14]] * 5] * 4}).entry
    assert entry["champion"] == "baseline@llamacpp"
    assert entry["rejected"]["int8@llamacpp"].startswith("not clearly faster than the reference: 1.0")


def test_nobody_is_crowned_on_a_machine_that_was_not_quiet() -> None:
    noisy = {"validity": "noisy"}
    entry = run(baseline=noisy, int8=noisy, **{"depth-int8": noisy}).entry
    assert entry["champion"] == "baseline@llamacpp"
    assert entry["rejected"]["int8@llamacpp"].startswith("not settled: the machine was not quiet while they took turns")
    assert entry["sentence"].startswith("keep the reference, variant baseline on engine llamacpp, for real-time QA")
    assert "is not settled: the machine was not quiet" in entry["sentence"]


def test_a_preview_of_a_champion_is_called_one() -> None:
    assert run(int8={"validity": "preview"}).entry["sentence"].endswith("; the measurement is a preview")


@pytest.mark.parametrize(("p", "text"), [(0.01234, "p = 0.0123"), (0.00001, "p < 0.0001"), (1.0, "p = 1.0000")])
def test_p_values_are_never_zero(p: float, text: str) -> None:
    assert p_value(p) == text


def test_points_have_a_sign_but_no_negative_zero() -> None:
    assert points_of({"points": -0.04, "ci95": [-1.26, 0.5]}) == "+0.0 points [-1.3, +0.5]"
