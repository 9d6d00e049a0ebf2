from pathlib import Path

import pytest

from hasten.engine.base import Request, Token
from hasten.errors import UserError
from hasten.evaluation.quality import (
    EXTRA_TOKENS,
    agreement,
    answer,
    by_task,
    load_predictions,
    pooled,
    save_predictions,
)
from hasten.task.base import Item
from tests.fakes import EOS, VOCABULARY, FakeSession, FakeTaskData, FakeTokenizer

ITEMS = [
    Item("a", "c1", "en", "w5 w6", " w7"),
    Item("b", "c1", "en", "w8", " w9"),
    Item("c", "c2", "zh", "w10", " w11"),
]
DATA = FakeTaskData(Path("tasks/quiz"), {"validation": ITEMS})


def reply(answers: dict[int, list[int]]):
    return lambda request: answers[request.prompt[-1]]


def answers(session: FakeSession, max_context: int = 64) -> list[dict]:
    return answer(session, DATA, FakeTokenizer(), "validation", max_context, VOCABULARY, lambda done, total: None)


def row(**changes) -> dict:
    return {
        "task": "quiz",
        "split": "validation",
        "item_id": "a",
        "cluster_id": "c",
        "language": "en",
        "expected": " w7",
        "output": "w7",
        "correct": 1.0,
        "output_tokens": 2,
    } | changes


def test_every_item_is_answered_once_and_scored():
    session = FakeSession(reply=reply({6: [7, EOS], 8: [3, EOS], 10: [11, 12, EOS]}))
    rows = answers(session)
    assert [(r["item_id"], r["cluster_id"], r["language"], r["output"], r["correct"]) for r in rows] == [
        ("a", "c1", "en", "w7", 1.0),
        ("b", "c1", "en", "w3", 0.0),
        ("c", "c2", "zh", "w11 w12", 0.0),
    ]
    assert [r["output_tokens"] for r in rows] == [2, 2, 3]
    assert {(r["task"], r["split"]) for r in rows} == {("quiz", "validation")}
    assert all(r.stop == {EOS} and r.max_tokens == 2 + EXTRA_TOKENS for r in session.requests)
    assert all(r.verify for r in session.requests)
    assert session.requests[0].prompt == (0, 5, 6)


def test_an_answer_that_never_stops_is_cut_and_an_empty_one_is_empty():
    session = FakeSession(reply=reply({6: [7] * (2 + EXTRA_TOKENS), 8: [EOS], 10: [11, EOS]}))
    rows = answers(session)
    assert rows[0]["output"] == "w7 w7 w7 w7 w7 w7"
    assert rows[0]["correct"] == 0.0
    assert (rows[1]["output"], rows[1]["correct"], rows[1]["output_tokens"]) == ("", 0.0, 1)


def test_answers_may_arrive_interleaved():
    class Interleaved(FakeSession):
        def generate(self, requests):
            streams = [self.submit(request) for request in requests]
            for _ in range(2):
                yield from (next(stream) for stream in streams)

    rows = answers(Interleaved(reply=reply({6: [7, EOS], 8: [9, EOS], 10: [11, EOS]})))
    assert [r["correct"] for r in rows] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "complaint"),
    [
        ([VOCABULARY, EOS], "token id 50, the vocabulary has 50"),
        ([-1], "token id -1"),
        ([EOS, 7], "went on after the end"),
        ([7] * 7, "went on after the end"),
        ([], "answered 0 of 3"),
        ([7, 8], "ended request 0 after 2 of 6 tokens"),
    ],
)
def test_an_engine_that_breaks_the_rules_is_caught(completion, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        answers(FakeSession(reply=lambda request: completion))


def test_an_answer_nobody_asked_for_is_caught():
    class Confused(FakeSession):
        def submit(self, request: Request):
            yield Token(request.id + 5, 7, 0.1)

    with pytest.raises(RuntimeError, match="answered request 5, which was not asked"):
        answers(Confused())


def test_a_prompt_that_does_not_fit_is_refused_by_name():
    with pytest.raises(UserError, match="max_context must be at least 9 for item a of task quiz, got 8"):
        answers(FakeSession(), max_context=8)


def test_quality_has_accuracy_per_task_and_split_beside_its_baselines():
    rows = [row(item_id=str(i), correct=float(i < 3), output_tokens=1 + i) for i in range(4)]
    rows += [row(task="frage", item_id="x", language="de", split="test")]
    manifests = {
        "quiz": {
            "language": "en",
            "baselines": {"majority": {"validation": 0.5, "test": 0.4}, "tfidf": None, "why": "few"},
        },
        "frage": {
            "language": "de",
            "baselines": {"majority": {"validation": 0.1, "test": 0.2}, "tfidf": {"test": 0.7}},
        },
    }
    quality = by_task(rows, manifests)
    assert quality["quiz"]["language"] == "en"
    assert (quality["quiz"]["validation"]["accuracy"], quality["quiz"]["validation"]["n"]) == (0.75, 4)
    low, high = quality["quiz"]["validation"]["ci95"]
    assert 0 < low < 0.75 < high < 1
    assert quality["quiz"]["baseline"] == {"majority": 0.5, "tfidf": None, "why": "few"}
    assert quality["quiz"]["mean_output_tokens"] == 2.5
    assert quality["frage"]["baseline"] == {"majority": 0.2, "tfidf": 0.7}


def test_pooled_accuracy_counts_items_of_all_tasks_alike():
    rows = [row(item_id=str(i), correct=1.0) for i in range(3)]
    rows += [row(task="frage", item_id="x", language="zh", correct=0.0)]
    assert pooled(rows)["validation"]["accuracy"] == 0.75
    assert pooled(rows)["validation"]["languages"]["zh"]["accuracy"] == 0.0
    assert pooled([]) == {}


def test_agreement_is_the_share_of_equal_outputs_on_common_items():
    rows = [row(item_id="a", output="x"), row(item_id="b", output="y"), row(item_id="c", output="z")]
    reference = [row(item_id="a", output="x"), row(item_id="b", output="?"), row(item_id="d", output="z")]
    assert agreement(rows, reference) == {"share": 0.5, "n": 2}
    with pytest.raises(UserError, match="at least one item"):
        agreement(rows, [row(item_id="q")])


def test_predictions_survive_the_disk(tmp_path):
    rows = [row(), row(item_id="b", output="", language="zh", expected=" 正面", correct=0.5)]
    save_predictions(rows, tmp_path / "p.parquet")
    assert load_predictions(tmp_path / "p.parquet").to_dict("records") == rows
    trials = [{"trial": "int8@x", **r} for r in rows]
    save_predictions(trials, tmp_path / "t.parquet")
    assert load_predictions(tmp_path / "t.parquet").to_dict("records") == trials


def test_no_predictions_make_an_empty_table_with_the_same_columns(tmp_path):
    from pyarrow import parquet

    save_predictions([], tmp_path / "p.parquet")
    table = parquet.read_table(tmp_path / "p.parquet")
    assert (table.num_rows, table.column_names) == (0, list(row()))


def test_a_corrupt_predictions_file_is_one_sentence(tmp_path):
    (tmp_path / "p.parquet").write_text("nonsense")
    with pytest.raises(UserError, match=r"p\.parquet is not a readable predictions file"):
        load_predictions(tmp_path / "p.parquet")
