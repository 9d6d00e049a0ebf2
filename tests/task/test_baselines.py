import pytest

from hasten.task.base import Item
from hasten.task.baselines import baselines
from hasten.task.jsonl import Jsonl
from hasten.task.reply_choice import ANSWER, QUESTION, ReplyChoice


def items(pairs: list[tuple[str, str]], language: str = "en") -> list[Item]:
    return [Item(str(n), str(n), language, prompt, expected) for n, (prompt, expected) in enumerate(pairs)]


def test_the_majority_is_the_most_frequent_training_answer() -> None:
    train = items([("a", "yes"), ("b", "yes"), ("c", "no")])
    scored = items([("d", "no"), ("e", "no"), ("f", "no"), ("g", "yes")])
    assert baselines(Jsonl(), {"train": train, "validation": scored, "test": train})["majority"] == {
        "validation": 0.25,
        "test": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("language", "good", "bad"), [("en", "lovely film", "dreadful film"), ("zh", "电影真好看", "电影真难看")]
)
def test_tfidf_learns_words_that_decide(language: str, good: str, bad: str) -> None:
    pairs = [(f"{text} {n}", answer) for n in range(8) for text, answer in ((good, "yes"), (bad, "no"))]
    train, scored = items(pairs, language), items([(good, "yes"), (bad, "no")], language)
    found = baselines(Jsonl(), {"train": train, "validation": scored, "test": scored})
    assert found["tfidf"] == {"validation": 1.0, "test": 1.0}


def test_choices_are_made_by_similarity() -> None:
    def item(number: int, expected: str) -> Item:
        options = f"A) I like cheese\nB) the weather is grey {number}\nC) no\nD) perhaps later"
        return Item(str(number), str(number), "en", f"A: how is the weather?{QUESTION}{options}{ANSWER}", expected)

    right, wrong = [item(1, " B"), item(2, " B")], [item(3, " A")]
    found = baselines(ReplyChoice(), {"train": right, "validation": right, "test": wrong})
    assert found["tfidf"] == {"validation": 1.0, "test": 0.0}


def test_a_baseline_that_makes_no_sense_is_null_with_a_reason() -> None:
    free = items([(f"prompt {n}", f"answer {n}") for n in range(60)])
    found = baselines(Jsonl(), {"train": free, "validation": free, "test": free})
    assert found["tfidf"] is None
    assert "60 distinct completions" in found["why"]
    found = baselines(Jsonl(), {"train": [], "validation": free, "test": free})
    assert found == {"majority": None, "tfidf": None, "why": "a split has no items"}
