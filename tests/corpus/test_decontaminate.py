from hypothesis import given
from hypothesis import strategies as st

from hasten.corpus.decontaminate import FEWEST_UNITS, PASSAGE_UNITS, Screen, found, passages

words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta's", "北京", "omega", "42", "Zürich"]), max_size=40)


def test_short_texts_are_not_looked_for() -> None:
    assert passages("how are you today?") == []
    assert len(passages("how are you doing today, friend?")) == 1


def test_long_texts_are_looked_for_passage_by_passage() -> None:
    text = " ".join(f"word{number}" for number in range(3 * PASSAGE_UNITS + 2))
    assert [len(passage) for passage in passages(text)] == [PASSAGE_UNITS] * 3


def test_a_passage_is_found_whatever_its_punctuation_and_case() -> None:
    screen = Screen.against(passages("Don't you think it's a LOVELY day?"))
    assert screen.hits("well, dont you think its a lovely\nday... he said")
    assert not screen.hits("don't you think it's a lovely evening?")


def test_short_chinese_passages_are_found() -> None:
    screen = Screen.against(passages("房间非常干净！"))
    assert screen.hits("我觉得房间 非常，干净。")
    assert not screen.hits("我觉得房间非常不干净。")


@given(before=words, item=words, after=words)
def test_a_document_that_holds_an_item_is_always_dropped(before: list[str], item: list[str], after: list[str]) -> None:
    wanted = passages(" ".join(item))
    document = ", ".join([*before, *item, *after]).upper()
    assert Screen.against(wanted).hits(document) == bool(wanted)


@given(document=words, items=st.lists(words, max_size=4))
def test_what_the_check_could_find_the_screen_drops(document: list[str], items: list[list[str]]) -> None:
    wanted = [passage for item in items for passage in passages(" ".join(item))]
    text = " ".join(document)
    left = found([text], wanted)
    assert all(len(passage) >= FEWEST_UNITS for passage in left)
    assert not left or Screen.against(wanted).hits(text)


def test_the_check_finds_each_passage_once() -> None:
    wanted = passages("one two three four five six") + passages("two three four five six seven")
    texts = ["zero one two three four five six seven eight", "one two three"]
    assert found(texts, wanted) == set(wanted)
    assert found(["one two three four five", "six"], wanted) == set()
