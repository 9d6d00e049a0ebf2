"""Two trials on the same items: pairing, flips, languages."""

from __future__ import annotations

import pandas as pd
import pytest

from hasten.errors import UserError
from hasten.evaluation.comparison import compare, flips, paired
from tests.study import STUDY, predictions

MARGINS = {"margin_points": 2.0, "language_margin_points": 3.0}


def frame(correct: list[float], languages: list[str] | None = None) -> pd.DataFrame:
    rows = [
        {"task": "t", "item_id": str(i), "cluster_id": str(i), "language": "en", "output": "x", "correct": value}
        for i, value in enumerate(correct)
    ]
    return pd.DataFrame(rows).assign(language=languages or ["en"] * len(correct))


def test_flips_are_what_only_one_side_got_right() -> None:
    found = compare(frame([1, 1, 0, 0, 1]), frame([1, 0, 1, 0, 0]), **MARGINS)
    assert (found.pooled.gained, found.pooled.lost) == (2, 1)
    assert found.pooled.difference.points.value == pytest.approx(20.0)
    evidence = found.describe(2.0)
    assert evidence["flips"] == {"gained": 2, "lost": 1} and evidence["flips_per_task"] == {"t": evidence["flips"]}
    assert evidence["mcnemar_p"] == 1.0


def test_every_task_and_language_has_its_own_evidence() -> None:
    first, second = (pd.DataFrame(predictions(made, "test", 200)) for made in STUDY[2:4])
    evidence = compare(second, first, **MARGINS).describe(2.0)
    keys = {"points", "ci95", "n", "clusters", "mcnemar_p", "flips"}
    assert set(evidence["per_task"]) == {"question_type", "reply_choice", "sentiment_en", "sentiment_zh"}
    assert all(set(part) == keys for part in evidence["per_task"].values())
    assert all(set(part) == keys | {"p"} for part in evidence["per_language"].values())
    assert evidence["per_task"]["reply_choice"]["clusters"] == 100 and evidence["per_task"]["reply_choice"]["n"] == 200
    assert sum(part["flips"]["lost"] for part in evidence["per_task"].values()) == evidence["flips"]["lost"]
    assert sum(part["n"] for part in evidence["per_language"].values()) == evidence["n"] == 800


def test_flips_are_listed_with_both_answers() -> None:
    candidate, reference = frame([1, 0, 1, 1]), frame([1, 1, 0, 1]).assign(output="y", expected="z")
    found = flips(candidate.assign(expected="z"), reference)
    assert [(row["item_id"], row["change"]) for row in found] == [("1", "lost"), ("2", "gained")]
    assert found[0] == {
        "task": "t", "item_id": "1", "language": "en", "expected": "z", "output_reference": "y",
        "output_candidate": "x", "change": "lost",
    }  # fmt: skip
    assert flips(reference, reference) == []


def test_order_of_rows_does_not_matter() -> None:
    first, second = (pd.DataFrame(predictions(made, "test", 60)) for made in STUDY[2:4])
    shuffled = second.sample(frac=1.0, random_state=0)
    assert compare(first, second, **MARGINS) == compare(first, shuffled, **MARGINS)


def test_a_loss_in_one_language_is_not_hidden_by_a_gain_in_another() -> None:
    languages = ["en"] * 500 + ["zh"] * 500
    candidate = frame([1.0] * 500 + [1.0] * 400 + [0.0] * 100, languages)
    reference = frame([0.0] * 100 + [1.0] * 400 + [1.0] * 500, languages)
    found = compare(candidate, reference, **MARGINS)
    assert found.pooled.difference.points.value == 0.0
    assert found.languages["zh"].difference.points.value == pytest.approx(-20)
    assert found.overall_p == found.language_p["zh"] > 0.99


def test_clusters_of_different_tasks_are_different() -> None:
    first = frame([1.0, 0.0]).assign(cluster_id="0")
    other = first.assign(task="u")
    both = pd.concat([first, other])
    assert compare(both, both, **MARGINS).pooled.difference.clusters == 2


@pytest.mark.parametrize("items", [slice(0, 3), slice(0, 0)])
def test_both_must_have_answered_the_same_items(items: slice) -> None:
    whole = frame([1.0] * 4)
    with pytest.raises(UserError, match="both trials must have answered the same items, got 4 and"):
        paired(whole[items], whole)


def test_other_items_of_the_same_number_are_refused() -> None:
    whole = frame([1.0] * 4)
    with pytest.raises(UserError, match="of which 3 are shared"):
        paired(whole.replace({"item_id": {"3": "9"}}), whole)


def test_an_item_answered_twice_is_refused() -> None:
    whole = frame([1.0] * 4)
    with pytest.raises(UserError, match="duplicates"):
        paired(pd.concat([whole, whole]), whole)
