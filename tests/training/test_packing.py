from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hasten.training.packing import best_fit


@given(sizes=st.lists(st.integers(1, 40), max_size=200), spare=st.integers(0, 40))
def test_every_item_is_in_one_bin_no_bin_overflows_and_no_two_could_be_one(sizes: list[int], spare: int) -> None:
    room = max(sizes, default=1) + spare
    bins = best_fit(sizes, room)
    assert sorted(item for held in bins for item in held) == list(range(len(sizes)))
    filled = [sum(sizes[item] for item in held) for held in bins]
    assert all(total <= room for total in filled)
    assert sum(2 * total <= room for total in filled) <= 1  # two of these would have gone together


def test_the_least_room_that_is_enough_is_taken() -> None:
    # 7 and 6 open a bin each; 3 fills the first to the brim, 4 the second, where first come would have put 3.
    assert best_fit([7, 6, 4, 3], 10) == [[0, 3], [1, 2]]
    assert best_fit([5, 5, 5, 5], 5) == [[0], [1], [2], [3]]
    assert best_fit([], 5) == []


def test_short_items_fill_their_rows() -> None:
    sizes = [5 + (37 * n) % 56 for n in range(400)]
    bins = best_fit(sizes, 128)
    assert sum(sizes) / (128 * len(bins)) > 0.98
