from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.training.data import Batch, Example, PackedExamples, Share, TaskBatches, padded


def numbered(lengths: list[int], prompt: int = 2, **facts: str) -> list[Example]:
    """Examples whose first id is their own number + 100, so that they can be told apart."""
    return [
        Example((100 + n, *[3] * (length - 1)), min(prompt, length - 1), **facts) for n, length in enumerate(lengths)
    ]


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=60))
    return [Example((100 + n, *range(3, 2 + prompt), *([9] * more)), prompt) for n, (prompt, more) in enumerate(shapes)]


def batches(items: list[Example], *, packing: int = 0, **changes: Any) -> TaskBatches:
    options: dict[str, Any] = {"batch_size": 4, "seed": 0, "prompt_weight": 0.25, "pad_id": 2, **changes}
    if "steps" not in options:
        options.setdefault("epochs", 3)
    return PackedExamples(items, length=packing, **options) if packing else TaskBatches(items, **options)


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def seen(batch: Batch) -> list[int]:
    """The numbers of a batch's items."""
    return [int(id_) - 100 for id_ in batch["ids"].flatten() if id_ >= 100]


@settings(max_examples=40, deadline=None)
@given(
    items=examples(), seed=st.integers(0, 9), order=st.randoms(use_true_random=False), packing=st.sampled_from([0, 40])
)
def test_every_item_is_seen_once_an_epoch_and_what_fills_it_up_begins_the_next(
    items: list[Example], seed: int, order: Any, packing: int
) -> None:
    data = batches(items, seed=seed, packing=packing)
    rows = len(data.rows)
    assert data.steps_per_epoch == -(-rows // 4)
    assert len(data) == data.steps == 3 * data.steps_per_epoch
    indices = list(range(len(data)))
    order.shuffle(indices)
    drawn = {index: data[index] for index in indices}
    again = batches(items, seed=seed, packing=packing)
    assert all(same(batch, again[index]) for index, batch in drawn.items())  # whatever was asked before
    assert all(len(batch["ids"]) == 4 for batch in drawn.values())
    for epoch in range(3):
        within = range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch)
        counts = Counter(n for index in within for n in seen(drawn[index]))
        assert counts.keys() == set(range(len(items)))
        filling = 4 * data.steps_per_epoch - rows  # drawn from the next orders
        assert max(counts.values()) <= 1 + -(-filling // rows)
        if not packing:
            assert counts.total() == rows + filling


def test_epochs_and_seeds_differ_in_order() -> None:
    items = numbered([3] * 64)
    data = batches(items)
    assert not same(data[0], data[data.steps_per_epoch])
    assert not same(data[0], batches(items, seed=1)[0])


def test_steps_may_be_said_instead_of_epochs_and_go_on_past_them() -> None:
    items = numbered([5, 3, 8, 9, 4])
    assert batches(items, epochs=5).steps == 10
    by_steps = batches(items, steps=7)
    assert len(by_steps) == by_steps.steps == 7
    assert same(by_steps[6], batches(items, epochs=5)[6])


def test_items_of_like_length_share_a_batch_so_that_little_is_padding() -> None:
    generator = np.random.default_rng(0)
    items = numbered([int(length) + 2 for length in generator.integers(1, 60, 128)])
    data = batches(items, epochs=1)
    cells = sum(data[index]["ids"].numel() for index in range(len(data)))
    real = sum(len(item.ids) for item in items)
    assert real / cells > 0.9  # random batches of four would be about 0.65


@pytest.mark.parametrize("packing", [0, 31])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_the_shares_of_a_step_have_equally_many_rows_of_one_width_and_know_the_weight_of_all(
    ranks: int, accumulate: int, packing: int
) -> None:
    items = numbered([3 + (7 * n) % 29 for n in range(31)], prompt=3)
    whole = batches(items, batch_size=12, packing=packing, steps=9)
    shares = [
        batches(items, batch_size=12, packing=packing, steps=9, share=Share(rank, ranks, accumulate))
        for rank in range(ranks)
    ]
    assert all(len(share) == 9 * accumulate for share in shares)
    for step in range(9):
        passes = [share[step * accumulate + i] for share in shares for i in range(accumulate)]
        width = whole[step]["ids"].shape[1]
        assert {tuple(one["ids"].shape) for one in passes} == {(12 // ranks // accumulate, width)}
        for name in whole[step].keys() - {"total"}:
            rows = [sorted(row for one in some for row in one[name].tolist()) for some in (passes, [whole[step]])]
            assert rows[0] == rows[1]
        total = float(whole[step]["weights"].sum())
        assert all(float(one["total"]) == pytest.approx(total, rel=1e-6) for one in passes)


def test_weights_are_zero_on_padding_and_the_first_token_and_small_on_the_rest_of_the_prompt() -> None:
    items = [Example((0, 5, 6, 7, 1), 3), Example((0, 8, 1), 2)]
    batch = padded(items, 0.25, pad_id=2)
    assert batch["ids"].tolist() == [[0, 5, 6, 7, 1], [0, 8, 1, 2, 2]]
    assert batch["weights"].tolist() == [[0, 0.25, 0.25, 1, 1], [0, 0.25, 1, 0, 0]]
    assert batch["prompt_tokens"].tolist() == [3, 2]
    assert batch["total"] == 3.75
    assert "documents" not in batch


def test_an_encoder_decoder_learns_nothing_from_the_prompt() -> None:
    data = batches([Example((0, 5, 6, 7, 1), 3)], batch_size=1, encodes_prompt=True)
    assert data[0]["weights"].tolist() == [[0, 0, 0, 1, 1]]
    assert data[0]["total"] == 2


def test_packed_items_lie_whole_one_after_another_and_each_is_a_document_of_its_own() -> None:
    items = [Example((0, 5, 6, 7, 1), 3), Example((0, 8, 1), 2), Example((0, 9, 9, 9, 9, 1), 1)]
    batch = batches(items, packing=9, batch_size=2)[0]
    order = batch["documents"][:, -1].argsort()  # the row of two items was not padded
    assert batch["ids"][order].tolist() == [[0, 5, 6, 7, 1, 2, 2, 2, 2], [0, 9, 9, 9, 9, 1, 0, 8, 1]]
    assert batch["documents"][order].tolist() == [[0, 0, 0, 0, 0, -1, -1, -1, -1], [0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert batch["weights"][order].tolist() == [[0, 0.25, 0.25, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0.25, 1]]
    assert batch["prompt_tokens"][order].tolist() == [3, 1]
    assert batch["total"] == batch["weights"].sum()


def test_an_item_that_fits_no_row_is_refused_with_its_task_and_both_lengths() -> None:
    message = r"sequence_length must fit every item .* got 7 for an item of task quiz with 9 tokens"
    with pytest.raises(UserError, match=message):
        batches(numbered([5, 9], task="quiz"), packing=7)


@pytest.mark.parametrize("packing", [0, 25])
def test_a_mixture_shows_tasks_and_languages_as_often_as_their_rates_say(packing: int) -> None:
    names = [("quiz", "en"), ("quiz", "zh"), ("chat", "zh")]
    items = [Example((100 + n, 3, 3, 3, 1), 2, *names[n % 3]) for n in range(60)]
    data = batches(items, packing=packing, steps=256, mixture={"quiz": 0.5, "zh": 4.0, "chat/zh": 0.0})
    counts = Counter(n % 3 for index in range(256) for n in seen(data[index]))
    assert counts.keys() == {0, 1}
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.05)
    with pytest.raises(UserError, match=r"groups that there are \(chat, chat/zh, en, quiz, quiz/en, quiz/zh, zh\)"):
        batches(items, packing=packing, mixture={"news": 1.0})


def test_fine_tuning_on_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="at least one training item, got none"):
        batches([])
