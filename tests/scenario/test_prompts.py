import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.scenario.prompts import PromptSource
from hasten.tokenizer.base import load_tokenizer
from hasten.tokenizer.translating import Translation
from tests.engine import llama
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


def test_a_variant_with_a_tokenizer_of_its_own_gets_the_same_text_in_prompts_as_long(tmp_path):
    import tokenizers

    llama.write_tokenizer(tmp_path)
    plan, own = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own.backend.model = tokenizers.models.BPE({text: 299 - i for i, text in enumerate(alphabet)}, [])  # bytes alone
    text = "The quick brown fox jumps over the lazy dog 2026 times. " * 3
    tokens = write_tokens(tmp_path / "tokens", plan.encode(text))
    prompts = PromptSource(tokens, Translation(plan, own)).draw(8, 30, seed=0)
    assert [len(prompt) for prompt in prompts] == [30] * 8
    assert all(own.decode(prompt) in text for prompt in prompts)
    assert not all(plan.decode(prompt) in text for prompt in prompts)
