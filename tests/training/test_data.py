from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Tokens
from hasten.errors import UserError
from hasten.training.data import Batch, Example, PackedTokens, TaskBatches, padded
from tests.tiny import write_tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    tokens = write_tokens(tmp_path_factory.mktemp("data") / "tokens", train=1003, validation=30)
    np.arange(1003, dtype=np.uint16).tofile(tokens.path / "train.bin")  # every token says where it stands
    return tokens


def packed(tokens: Tokens, seed: int = 0, batch_size: int = 3, length: int = 10) -> PackedTokens:
    return PackedTokens(tokens, "train", batches=90, batch_size=batch_size, length=length, seed=seed)


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), indices=st.lists(st.integers(0, 89), min_size=1, max_size=8))
def test_a_pre_training_batch_is_a_pure_function_of_seed_and_index(
    tokens: Tokens, seed: int, indices: list[int]
) -> None:
    used = packed(tokens, seed)
    for index in indices:  # whatever was asked for before, in whatever order
        assert same(used[index], packed(tokens, seed)[index])


def test_another_seed_and_another_epoch_give_another_order(tokens: Tokens) -> None:
    data = packed(tokens)
    assert not torch.equal(data[0]["ids"], packed(tokens, seed=1)[0]["ids"])
    first, second = ([data.sequence(epoch * 100 + place) for place in range(100)] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(100))  # every sequence once an epoch


def test_a_pre_training_batch_holds_whole_slices_of_the_stream_and_scores_all_but_the_first_token(
    tokens: Tokens,
) -> None:
    batch = packed(tokens)[5]
    assert batch["ids"].shape == batch["weights"].shape == (3, 10)
    assert batch["ids"].dtype is torch.int64
    starts = batch["ids"][:, 0]
    assert (starts % 10 == 0).all()
    assert torch.equal(batch["ids"] - starts[:, None], torch.arange(10).expand(3, 10))
    assert torch.equal(batch["weights"], torch.tensor([0.0] + [1.0] * 9).expand(3, 10))


def test_an_epoch_may_end_within_a_batch(tokens: Tokens) -> None:
    data = packed(tokens, batch_size=7)  # 100 sequences: the 15th batch takes 5 rows from the next epoch
    drawn = [int(start) // 10 for index in range(15) for start in data[index]["ids"][:, 0]]
    assert sorted(drawn[:100]) == list(range(100))


def test_a_split_shorter_than_a_sequence_is_refused_with_both_lengths(tokens: Tokens) -> None:
    with pytest.raises(UserError, match="sequence_length must fit the train split, got 2000 for 1003 tokens"):
        packed(tokens, length=2000)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    """Examples whose first id is their own number, so that they can be told apart."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=60))
    return [Example((100 + n, *range(3, 2 + prompt), *([9] * more)), prompt) for n, (prompt, more) in enumerate(shapes)]


def batches(items: list[Example], seed: int = 0, epochs: int = 3, batch_size: int = 4) -> TaskBatches:
    return TaskBatches(items, epochs=epochs, batch_size=batch_size, seed=seed, prompt_weight=0.25, pad_id=2)


@settings(max_examples=40, deadline=None)
@given(items=examples(), seed=st.integers(0, 9), order=st.randoms(use_true_random=False))
def test_every_item_is_seen_once_an_epoch_and_batches_do_not_depend_on_what_was_asked_before(
    items: list[Example], seed: int, order: object
) -> None:
    data = batches(items, seed)
    assert len(data) == 3 * -(-len(items) // 4)
    indices = list(range(len(data)))
    order.shuffle(indices)  # type: ignore[attr-defined]
    drawn = {index: data[index] for index in indices}
    assert all(same(batch, batches(items, seed)[index]) for index, batch in drawn.items())
    for epoch in range(3):
        within = range(epoch * data.per_epoch, (epoch + 1) * data.per_epoch)
        assert sorted(int(n) - 100 for index in within for n in drawn[index]["ids"][:, 0]) == list(range(len(items)))


def test_epochs_and_seeds_differ_in_order() -> None:
    items = [Example((100 + n, 3, 9), 2) for n in range(64)]
    data = batches(items)
    assert not same(data[0], data[data.per_epoch])
    assert not same(data[0], batches(items, seed=1)[0])


def test_items_of_like_length_share_a_batch_so_that_little_is_padding() -> None:
    generator = np.random.default_rng(0)
    items = [Example((100 + n, *[3] * int(length), 9), 2) for n, length in enumerate(generator.integers(1, 60, 128))]
    data = batches(items, epochs=1)
    cells = sum(data[index]["ids"].numel() for index in range(len(data)))
    real = sum(len(item.ids) for item in items)
    assert real / cells > 0.9  # random batches of four would be about 0.65


def test_weights_are_zero_on_padding_and_the_first_token_and_small_on_the_rest_of_the_prompt() -> None:
    batch = padded([Example((0, 5, 6, 7, 1), 3), Example((0, 8, 1), 2)], 0.25, pad_id=2)
    assert batch["ids"].tolist() == [[0, 5, 6, 7, 1], [0, 8, 1, 2, 2]]
    assert batch["weights"].tolist() == [[0, 0.25, 0.25, 1, 1], [0, 0.25, 1, 0, 0]]


def test_fine_tuning_on_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="at least one training item, got none"):
        batches([])
