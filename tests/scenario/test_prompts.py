import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.scenario.prompts import PromptSource
from tests.fakes import write_tokens


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return PromptSource(write_tokens(tmp_path_factory.mktemp("tokens"), list(range(300))))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 20), length=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_prompts_are_slices_of_the_validation_split(source, count, length, seed):
    prompts = source.draw(count, length, seed)
    assert [len(prompt) for prompt in prompts] == [length] * count
    for prompt in prompts:
        assert prompt == tuple(range(prompt[0], prompt[0] + length))


def test_the_seed_decides_the_prompts(source):
    assert source.draw(5, 16, seed=1) == source.draw(5, 16, seed=1)
    assert source.draw(5, 16, seed=1) != source.draw(5, 16, seed=2)


def test_prompts_differ_from_one_another(source):
    assert len(set(source.draw(10, 16, seed=0))) > 5


def test_text_shorter_than_a_prompt_is_repeated(tmp_path):
    (prompt,) = PromptSource(write_tokens(tmp_path, [7, 8, 9])).draw(1, 7, seed=0)
    assert prompt == (7, 8, 9, 7, 8, 9, 7)


def test_an_empty_validation_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="validation split must hold at least one token"):
        PromptSource(write_tokens(tmp_path, []))
