from hypothesis import given
from hypothesis import strategies as st

from hasten.corpus.text import compact, shorten, uniform, units


def test_units_are_words_and_single_chinese_characters() -> None:
    assert units("Don't PANIC, 42！北京ＡＢ") == ["don", "t", "panic", "42", "北", "京", "ab"]


@given(st.text())
def test_compact_form_ignores_case_spacing_and_punctuation(text: str) -> None:
    assert compact(f"  {text} !") == compact(text)
    assert compact(compact(text)) == compact(text)


@given(st.text(), st.integers(min_value=8, max_value=50))
def test_shortened_text_keeps_to_the_limit_and_begins_the_text(text: str, limit: int) -> None:
    short = shorten(text, limit)
    whole = " ".join(text.split())
    assert len(short) <= limit
    assert short == whole or (short.endswith("…") and whole.startswith(short[:-1]))


def test_shortening_prefers_the_end_of_a_word() -> None:
    assert shorten("a reasonably long sentence", 16) == "a reasonably…"
    assert shorten("any length", 0) == "any length"


@given(st.lists(st.text(), unique=True, min_size=1))
def test_uniform_numbers_are_stable_and_in_range(keys: list[str]) -> None:
    numbers = [uniform(key) for key in keys]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == len(keys)
    assert uniform("hasten") == uniform("hasten")
