import pytest

from hasten.errors import UserError
from hasten.task.base import SPLITS, Item
from hasten.task.reply_choice import LETTERS, ReplyChoice
from tests.archives import chitchat, install


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"chitchat_dataset/dataset.json": chitchat(200)})


@pytest.fixture
def by_split() -> dict[str, list[Item]]:
    return {split: list(ReplyChoice().items(split)) for split in SPLITS}


def test_a_prompt_shows_the_context_and_four_options(by_split: dict[str, list[Item]]) -> None:
    item = by_split["test"][0]
    lines = item.prompt.splitlines()
    assert [line[:3] for line in lines] == ["A: ", "B: ", "Nex", "A) ", "B) ", "C) ", "D) ", "Ans"]
    assert item.prompt.endswith("\nAnswer:")


def test_the_answer_is_what_was_really_said_next(by_split: dict[str, list[Item]]) -> None:
    for items in by_split.values():
        for item in items:
            context, options = ReplyChoice().choices(item)
            number = context.split("hello number ")[1][:3]
            right = [letter for letter, text in options.items() if number in text]
            assert right == [item.expected]
            assert len(set(options.values())) == len(LETTERS)


def test_distractors_come_from_the_same_split(by_split: dict[str, list[Item]]) -> None:
    for items in by_split.values():
        numbers = {item.cluster.removeprefix("chitchat/c").zfill(3) for item in items}
        for item in items:
            assert all(text[-3:] in numbers for text in ReplyChoice().choices(item)[1].values())


def test_letters_are_balanced(by_split: dict[str, list[Item]]) -> None:
    answers = [item.expected for item in by_split["train"]]
    assert all(answers.count(f" {letter}") > len(answers) / 8 for letter in LETTERS)


def test_the_cluster_is_the_document_to_hold_out(by_split: dict[str, list[Item]]) -> None:
    assert all(item.cluster.startswith("chitchat/c") for items in by_split.values() for item in items)
    clusters = [{item.cluster for item in items} for items in by_split.values()]
    assert sum(map(len, clusters)) == len(set().union(*clusters)) == 200


def test_everything_shown_is_protected_without_speakers_and_letters(by_split: dict[str, list[Item]]) -> None:
    protected = ReplyChoice().protected(by_split["test"][0])
    assert len(protected) == 2 + len(LETTERS)
    assert not any(text.startswith(("A: ", "B: ", "A) ")) for text in protected)


def test_texts_are_shortened() -> None:
    task = ReplyChoice(context_characters=20, option_characters=36)
    context, options = task.choices(next(task.items("validation")))
    assert all(len(line) <= 3 + 20 for line in context.splitlines())
    assert all(len(text) <= 36 for text in options.values())


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match="needs 4 different replies in a split, got 3"):
        list(ReplyChoice(train_items=3).items("train"))
    with pytest.raises(UserError, match="context_turns must be at least 1"):
        ReplyChoice(context_turns=0)
