import pytest

from hasten.corpus.chitchat import Chitchat
from hasten.errors import UserError
from tests.archives import chitchat, install


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"chitchat_dataset/dataset.json": chitchat(5)})


def test_a_conversation_is_one_document_with_a_line_per_turn() -> None:
    document = next(Chitchat().documents())
    assert document.id == "chitchat/c0"
    assert document.language == "en"
    assert document.text.splitlines() == [
        "A: hello number 000 do you like bread?",
        "B: yes I like bread of kind 000 very much",
        "A: then let us talk about bread until evening 000",
    ]


def test_senders_and_times_are_dropped() -> None:
    text = "\n".join(document.text for document in Chitchat().documents())
    assert "person" not in text
    assert "2018" not in text


def test_conversations_that_nobody_answered_are_left_out() -> None:
    assert "chitchat/lonely" not in [document.id for document in Chitchat().documents()]


def test_documents_are_limited_from_the_start() -> None:
    every = list(Chitchat().documents())
    assert list(Chitchat(limit_documents=2).documents()) == every[:2]


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(UserError, match="limit_documents must be 0"):
        Chitchat(limit_documents=-1)
