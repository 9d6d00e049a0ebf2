"""Who goes to the final, and why the others do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from hasten.errors import UserError
from hasten.evaluation.qualifying import Qualified
from hasten.evaluation.selection import seats, select
from tests.study import STUDY, Made, frames, measurements

OPTIONS: dict[str, Any] = {
    "plan": "default",
    "scenarios": ["qa"],
    "margin_points": 2.0,
    "language_margin_points": 3.0,
}


def chosen(study: tuple[Made, ...] = STUDY, **options: Any) -> dict[str, Any]:
    result = select(measurements(study), frames(study), **(OPTIONS | options))
    json.dumps(result, allow_nan=False)
    return result["scenarios"]["qa"]


def test_the_reference_is_the_float_baseline_on_its_fastest_engine() -> None:
    assert chosen()["reference"] == "baseline@llamacpp"
    assert chosen(STUDY[:1] + STUDY[2:])["reference"] == "baseline@eager"


def test_every_trial_is_reference_finalist_or_rejected_with_a_reason() -> None:
    entry = chosen()
    trials = [entry["reference"], *entry["finalists"], *entry["rejected"]]
    assert sorted(trials) == sorted(made.trial for made in STUDY)
    reasons = entry["rejected"]
    assert reasons["int4@eager"] == "failed: it was still running after 600 s"
    assert reasons["int8-channel@llamacpp"].startswith("refused: llamacpp has no format")
    assert reasons["baseline@eager"] == "not faster than the reference: 0.32x"
    assert "clearly more than 2" in reasons["depth-int4@llamacpp"]


def test_a_dequantised_run_does_not_compete_on_speed() -> None:
    fast = Made("int8@eager", ("baseline", "int8"), "rtn", 0.01, native=False)
    assert chosen((STUDY[1], fast))["rejected"]["int8@eager"].startswith("not native")


def test_a_quantised_first_variant_is_no_baseline() -> None:
    entry = chosen((Made("int8@llamacpp", ("int8",), "rtn", 0.05),))
    assert entry["reference"] is None and entry["finalists"] == [] and "float baseline" in entry["why"]


def test_an_engines_own_rounding_of_the_baseline_is_a_rival() -> None:
    """As the reference it would set the accuracy that others are held to."""
    study = (STUDY[1], Made("q4@llamacpp", ("baseline",), "identity", 0.03, 0.2, 0.0), STUDY[3])
    measured = measurements(study)
    assert select(measured, frames(study), **OPTIONS)["scenarios"]["qa"]["reference"] == "q4@llamacpp"
    measured[1]["converted"] = True
    entry = select(measured, frames(study), **OPTIONS)["scenarios"]["qa"]
    assert entry["reference"] == "baseline@llamacpp"
    assert "clearly more than 2" in entry["rejected"]["q4@llamacpp"]


def test_nothing_faster_means_no_finalists() -> None:
    entry = chosen((STUDY[0], STUDY[1]))
    assert entry["finalists"] == [] and "why" not in entry


def test_a_clear_loss_in_one_language_rejects() -> None:
    bad = Made("zh@llamacpp", ("baseline", "zh"), "rtn", 0.05, 0.0, 0.01, lost_zh=0.06)
    study = (STUDY[1], bad)
    result = select(measurements(study, 800), frames(study, 800), **OPTIONS | {"margin_points": 5.0})
    assert "in zh on validation, clearly more than 3" in result["scenarios"]["qa"]["rejected"]["zh@llamacpp"]


def test_a_doubtful_loss_is_left_to_the_test_split() -> None:
    entry = chosen(finalists=9)
    assert {"int8@llamacpp", "depth@llamacpp"} <= set(entry["finalists"])
    assert entry["finalists"][0] == "depth-int8@llamacpp"  # fastest first


@pytest.mark.parametrize(
    ("likely", "finalists", "expected"),
    [
        ({"a": False, "b": False, "c": True}, 2, ["a", "c"]),
        ({"a": False, "b": True, "c": True}, 2, ["a", "b"]),
        ({"a": False, "b": False, "c": False}, 2, ["a", "b"]),
        ({"a": False, "b": True}, 1, ["b"]),
        ({}, 2, []),
    ],
)
def test_one_seat_is_kept_for_the_fastest_safe_candidate(
    likely: dict[str, bool], finalists: int, expected: list[str]
) -> None:
    assert seats(likely, finalists) == expected


def test_more_is_better_for_throughput() -> None:
    found = measurements(STUDY[1:3])
    for measured in found:
        entry = measured["speed"]["qa"]
        entry["headline"], entry["lower_is_better"] = "decode_tokens_per_second", False
    entry = select(found, frames(STUDY[1:3]), **OPTIONS)["scenarios"]["qa"]
    assert entry["finalists"] == ["int8@llamacpp"] and entry["headline"] == "decode_tokens_per_second"


def test_a_scenario_that_nobody_ran_has_no_reference() -> None:
    result = select(measurements(STUDY[:3]), frames(STUDY[:3]), **OPTIONS | {"scenarios": ["dialogue"]})
    entry = result["scenarios"]["dialogue"]
    assert entry["reference"] is None and entry["headline"] is None
    assert entry["rejected"]["int8@llamacpp"] == "its speed in scenario dialogue was not measured"


def test_missing_predictions_are_named() -> None:
    known = frames()
    del known["int4@llamacpp"]
    with pytest.raises(UserError, match="predictions of trial int4@llamacpp do not exist"):
        select(measurements(), known, **OPTIONS)


def test_predictions_of_other_items_are_named() -> None:
    known = frames()
    known["int8@llamacpp"] = known["int8@llamacpp"][5:]
    with pytest.raises(UserError, match="int8@llamacpp against baseline@llamacpp: both trials must have answered"):
        select(measurements(), known, **OPTIONS)


@pytest.mark.parametrize(
    ("option", "value"), [("finalists", 0), ("margin_points", 0.0), ("language_margin_points", 100.0)]
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option} must be"):
        select([], {}, **OPTIONS | {option: value})


def test_the_qualifying_round_overrules_screening() -> None:
    asked: list[list[str]] = []

    def play(scenario: str, trials: Sequence[str]) -> Qualified:
        asked.append(list(trials))
        speeds = dict.fromkeys(trials, 1.0) | {"int8@llamacpp": 2.5, "depth-int8@llamacpp": 0.9}
        return Qualified(speeds)

    entry = chosen(qualify=play)
    assert "baseline@eager" not in asked[0]  # too slow to have been unlucky
    assert "int8@eager" not in asked[0]  # not native
    assert "depth-int4@llamacpp" not in asked[0]  # clearly less accurate
    assert entry["reference"] == "baseline@llamacpp"
    assert entry["finalists"] == ["int8@llamacpp"]
    assert entry["rejected"]["depth-int8@llamacpp"] == "not faster than the reference: 0.90x"
    assert entry["rejected"]["baseline@eager"] == "left behind: 0.32x, screened"
    assert entry["qualifying"]["speeds"]["int8@llamacpp"] == 2.5


def test_the_reference_is_the_baseline_that_is_faster_side_by_side() -> None:
    half = Made("baseline-f16@llamacpp", ("baseline",), "identity", 0.15, 0.001, 0.001, kernel="F16")
    study = (STUDY[1], half, STUDY[2])
    assert chosen(study)["reference"] == "baseline@llamacpp"
    speeds = {"baseline@llamacpp": 1.0, "baseline-f16@llamacpp": 1.25, "int8@llamacpp": 2.5}
    entry = chosen(study, qualify=lambda scenario, trials: Qualified(speeds))
    assert entry["reference"] == "baseline-f16@llamacpp"
    assert entry["qualifying"]["speeds"]["int8@llamacpp"] == 2.0
    assert entry["rejected"]["baseline@llamacpp"] == "not faster than the reference: 0.80x"


def test_who_fails_in_the_qualifying_round_is_rejected_with_the_reason() -> None:
    speeds = {"baseline@llamacpp": 1.0, "depth-int8@llamacpp": 2.0}
    played = Qualified(speeds, {"int8@llamacpp": "failed: it crashed"})
    assert chosen(qualify=lambda scenario, trials: played)["rejected"]["int8@llamacpp"] == "failed: it crashed"


def test_screening_decides_where_no_round_could_be_played() -> None:
    entry = chosen(qualify=lambda scenario, trials: Qualified(why="they do not fit"))
    assert entry["finalists"] == chosen()["finalists"]
    assert entry["qualifying"] == {"speeds": None, "why": "they do not fit"}


def test_what_the_finalists_need_of_memory_goes_along() -> None:
    entry = chosen()
    assert set(entry["peak_memory_bytes"]) == {entry["reference"], *entry["finalists"]}
    assert all(entry["peak_memory_bytes"].values())
