"""What the confirmation proves."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from hasten.errors import UserError
from hasten.evaluation.decision import confirmed
from tests.study import STUDY, Made, confirmation

REFERENCE = STUDY[1]
SAFE = Made("safe@llamacpp", ("baseline", "safe"), "rtn", 0.06, 0.004, 0.008)
BAD = Made("bad@llamacpp", ("baseline", "bad"), "rtn", 0.04, 0.15, 0.0)
LOPSIDED = Made("lopsided@llamacpp", ("baseline", "lopsided"), "rtn", 0.05, 0.0, 0.01, lost_zh=0.09)
COPY = Made("copy@llamacpp", ("baseline", "copy"), "rtn", 0.07, 0.001, 0.001)


def finalists(*trials: Made, reference: str | None = REFERENCE.trial) -> dict[str, Any]:
    names = [made.trial for made in trials]
    entry = {"reference": reference, "finalists": names, "rejected": {}, "lower_is_better": True}
    return {"plan": "p", "margin_points": 2.0, "language_margin_points": 3.0, "scenarios": {"qa": entry}}


def evidence(*trials: Made, **shape: int) -> dict[str, Any]:
    chosen = finalists(*trials)
    result = confirmed(*confirmation(chosen, (REFERENCE, *trials), **shape), chosen)
    json.dumps(result, allow_nan=False)
    return result["qa"]["trials"]


def test_a_small_loss_is_non_inferior_and_a_large_one_inferior() -> None:
    found = evidence(SAFE, BAD, items=900)
    assert found[SAFE.trial]["decision"] == "non-inferior"
    assert found[BAD.trial]["decision"] == "inferior" and found[BAD.trial]["decisive_language"] is None
    assert found[REFERENCE.trial]["decision"] is None
    low, high = found[SAFE.trial]["speedup"]["ci95"]
    assert low < 0.131 / 0.06 < high


def test_a_loss_in_one_language_decides() -> None:
    found = evidence(LOPSIDED, items=900)[LOPSIDED.trial]
    assert found["decision"] == "inferior" and found["decisive_language"] == "zh"


def test_too_few_items_are_undecided_and_say_how_many_more() -> None:
    found = evidence(COPY, items=30)[COPY.trial]
    assert found["decision"] == "undecided" and found["needs_items"] > 30


def test_more_finalists_make_each_harder_to_prove() -> None:
    alone = evidence(SAFE)[SAFE.trial]["accuracy_difference"]
    among = evidence(SAFE, BAD, LOPSIDED)[SAFE.trial]["accuracy_difference"]
    assert among["p"] == alone["p"]
    assert among["p_holm"] == pytest.approx(3 * alone["p_holm"])


def test_advice_is_in_items_of_the_decisive_language_and_in_all() -> None:
    zh = Made("zh@llamacpp", ("baseline", "zh"), "rtn", 0.05, 0.0, 0.0, lost_zh=0.03)
    found = evidence(zh, items=400)[zh.trial]
    assert found["decision"] == "undecided" and found["decisive_language"] == "zh"
    # A quarter of the items are Chinese.
    assert found["needs_items_total"] / 4 <= found["needs_items"] <= found["needs_items_total"] / 4 * 1.1 + 1


def test_finalists_that_passed_do_not_make_the_others_advice_harder() -> None:
    pooled = evidence(SAFE, COPY, items=300)
    assert pooled[SAFE.trial]["decision"] == "non-inferior"
    alone, with_copy = (evidence(*trials, items=60)[COPY.trial] for trials in ((COPY,), (COPY, BAD)))
    assert with_copy["needs_items"] >= alone["needs_items"]


def test_speedup_tells_its_rounds() -> None:
    found = evidence(SAFE, rounds=5)[SAFE.trial]["speedup"]
    assert found["n"] == len(found["rounds"]) == 5 and found["why"] is None
    assert found["ci95"][0] < found["ratio"] < found["ci95"][1]


def test_one_round_gives_no_speedup_but_an_accuracy() -> None:
    found = evidence(SAFE, rounds=1)[SAFE.trial]
    assert found["speedup"]["ratio"] is None and "2 rounds, got 1" in found["speedup"]["why"]
    assert found["accuracy_difference"]["n"] == 2400


def test_a_noisy_confirmation_is_passed_on() -> None:
    chosen = finalists(SAFE)
    measured, answers = confirmation(chosen, (REFERENCE, SAFE), items=20)
    measured["scenarios"]["qa"]["trials"][SAFE.trial]["validity"] = "noisy"
    assert confirmed(measured, answers, chosen)["qa"]["trials"][SAFE.trial]["validity"] == "noisy"


def test_accuracy_of_a_trial_knows_its_clusters() -> None:
    chosen = finalists(SAFE)
    measured, answers = confirmation(chosen, (REFERENCE, SAFE), items=300)
    alike = answers.assign(cluster_id=answers["item_id"].str.rsplit("-", n=1).str[-1].astype(int) // 30)
    alike["correct"] = (alike["cluster_id"] % 4 != 0).astype(float)
    apart = alike.assign(cluster_id=alike["item_id"])
    wide, narrow = (
        confirmed(measured, rows, chosen)["qa"]["trials"][SAFE.trial]["accuracy"] for rows in (alike, apart)
    )
    assert wide["ci95"][1] - wide["ci95"][0] > 3 * (narrow["ci95"][1] - narrow["ci95"][0])


def test_a_finalist_that_failed_is_kept_with_its_error() -> None:
    chosen = finalists(SAFE, BAD)
    measured, answers = confirmation(chosen, (REFERENCE, SAFE, BAD), items=50)
    measured["scenarios"]["qa"]["trials"][BAD.trial] |= {"status": "failed", "error": "it crashed", "rounds": []}
    found = confirmed(measured, answers[answers["trial"] != BAD.trial], chosen)["qa"]["trials"]
    assert found[BAD.trial]["error"] == "it crashed" and found[BAD.trial]["decision"] is None
    assert found[SAFE.trial]["decision"] is not None


def test_without_the_reference_nothing_is_compared() -> None:
    chosen = finalists(SAFE)
    measured, answers = confirmation(chosen, (REFERENCE, SAFE), items=50)
    measured["scenarios"]["qa"]["trials"][REFERENCE.trial] |= {"status": "failed", "error": "it crashed"}
    assert confirmed(measured, answers, chosen)["qa"]["trials"][SAFE.trial]["decision"] is None


def test_a_scenario_without_reference_has_no_trials() -> None:
    chosen = finalists(reference=None)
    found = confirmed(*confirmation(chosen, ()), chosen)["qa"]
    assert found["reference"] is None and found["trials"] == {}


def test_files_that_do_not_belong_together_are_refused() -> None:
    measured, answers = confirmation(finalists(SAFE), (REFERENCE, SAFE), items=20)
    with pytest.raises(UserError, match="disagree on the reference of scenario qa"):
        confirmed(measured, answers, finalists(SAFE, reference="other@eager"))
    with pytest.raises(UserError, match="test-split answers of safe@llamacpp"):
        confirmed(measured, pd.DataFrame(), finalists(SAFE))
