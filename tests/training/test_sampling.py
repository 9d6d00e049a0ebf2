from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.training.sampling import BLOCK, Mixture, keyed, permuted, rates


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_takes_every_number_to_another_one(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 500), key=st.integers(0, 2**64 - 1), data=st.data())
def test_one_number_goes_where_it_goes_among_all_whatever_else_is_asked(n: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, n - 1))
    others = data.draw(st.lists(st.integers(0, n - 1), max_size=5))
    alone = permuted(index, n, key)
    assert alone == permuted(np.arange(n), n, key)[index]
    keys = np.array([*range(len(others)), key], np.uint64)
    assert permuted(np.array([*others, index]), n, keys)[-1] == alone


def test_a_range_far_beyond_memory_is_permuted_at_once() -> None:
    n = 10**15
    index = np.append(np.arange(1000), n - 1 - np.arange(1000))
    places = permuted(index, n, 5)
    assert len(set(places.tolist())) == 2000
    assert 0 <= places.min() < n / 100 and n * 0.99 < places.max() < n  # spread over all of it


@pytest.mark.parametrize("n", [3, 10, 16, 50])
def test_over_many_keys_every_number_goes_everywhere_equally_often(n: int) -> None:
    tries = 20_000
    keys = keyed(7, np.arange(tries))
    for index in (0, n // 2, n - 1):
        counts = np.bincount(permuted(np.full(tries, index), n, keys), minlength=n)
        squares = float(((counts - tries / n) ** 2).sum() / (tries / n))
        assert squares < n - 1 + 6 * (2 * (n - 1)) ** 0.5  # chi-squared: its mean and six standard deviations


def test_neighbours_do_not_stay_neighbours() -> None:
    places = permuted(np.arange(10_000), 10_000, 1)
    assert (np.abs(np.diff(places)) == 1).sum() < 15  # two are to be expected by chance
    assert abs(float(np.corrcoef(np.arange(10_000), places)[0, 1])) < 0.05


def test_keys_that_differ_by_little_give_unrelated_orders() -> None:
    orders = [permuted(np.arange(1000), 1000, keyed(0, 1, 0, epoch)) for epoch in range(8)]
    for one in range(8):
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 12  # one by chance


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    groups = draw(st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([0, 0.01, 0.5, 1, 3])), min_size=1))
    sizes, weights = [size for size, _ in groups], [rate for _, rate in groups]
    return Mixture(sizes, weights if any(weights) else [1.0] * len(groups), draw(st.integers(0, 99)))


@settings(deadline=None, max_examples=60)
@given(mixture=mixtures(), blocks=st.integers(1, 6))
def test_after_whole_blocks_every_group_has_had_its_share_and_none_of_its_draws_is_missing(
    mixture: Mixture, blocks: int
) -> None:
    total = blocks * BLOCK
    group, nth = mixture.draw(np.arange(total))
    shares = mixture.parts / mixture.parts.sum()
    for number, share in enumerate(shares):
        own = nth[group == number]
        assert np.array_equal(np.sort(own), np.arange(len(own)))
        assert abs(len(own) - share * total) <= (len(shares) + 1) / 2
        assert len(own) == 0 or share > 0


@settings(deadline=None, max_examples=30)
@given(mixture=mixtures(), wanted=st.lists(st.integers(0, 10**11), min_size=1, max_size=20))
def test_a_draw_does_not_depend_on_what_else_is_drawn(mixture: Mixture, wanted: list[int]) -> None:
    together = np.stack(mixture.item(np.array(wanted)))  # (2, I)
    alone = np.concatenate([np.stack(mixture.item(index)) for index in wanted], axis=1)
    assert np.array_equal(together, alone)
    assert (together[1] < np.array(mixture.sizes)[together[0]]).all() and together.min() >= 0


def test_a_group_with_a_share_of_less_than_one_draw_per_block_still_comes_up() -> None:
    group, _ = Mixture([10**6, 100], [1, 1], 0).draw(np.arange(100 * BLOCK))
    assert abs((group == 1).sum() - 100 * BLOCK / 10**4) <= 1.5


def test_groups_alternate_within_a_block_instead_of_following_each_other() -> None:
    group, _ = Mixture([500, 500], [1, 1], 3).draw(np.arange(BLOCK))
    changes = (np.diff(group) != 0).mean()
    assert 0.4 < changes < 0.6  # as if thrown, neither runs nor strict alternation


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 300), seed=st.integers(0, 99), epoch=st.integers(0, 50))
def test_one_group_is_a_new_permutation_every_epoch(size: int, seed: int, epoch: int) -> None:
    mixture = Mixture([size], [0.3], seed)
    group, item = mixture.item(epoch * size + np.arange(size))
    assert not group.any()
    assert np.array_equal(np.sort(item), np.arange(size))
    if size > 20:
        assert not np.array_equal(item, mixture.item((epoch + 1) * size + np.arange(size))[1])


def test_each_group_shows_every_item_once_before_any_comes_again() -> None:
    mixture = Mixture([40, 7], [1, 3], 5)
    group, item = mixture.item(np.arange(20 * BLOCK))
    order = np.argsort(mixture.draw(np.arange(20 * BLOCK))[1], kind="stable")  # in the order of each group's own draws
    for number, size in ((0, 40), (1, 7)):
        own = item[order][group[order] == number]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_seeds_differ() -> None:
    one, other = (np.stack(Mixture([40, 7], [1, 3], seed).item(np.arange(100))) for seed in (0, 1))
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[1], other[1])


GROUPS = [("chitchat", "en"), ("news", "en"), ("news", "zh")]


def test_rates_multiply_over_sources_and_languages_and_are_one_where_nothing_is_said() -> None:
    found = rates({"news": 2, "zh": 0.25, "chitchat/en": 3}, GROUPS)
    assert found == {("chitchat", "en"): 3, ("news", "en"): 2, ("news", "zh"): 0.5}
    assert rates({}, [("", "")]) == {("", ""): 1}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (
            {"fr": 1.0},
            r"groups that there are \(chitchat, chitchat/en, en, news, news/en, news/zh, zh\), got 'fr'",
        ),
        ({"en": 0.0, "news": 0.0}, "must leave at least one group above 0, got {'en': 0.0, 'news': 0.0}"),
        ({"en": -1.0}, r"training\.mixture\.en must be 0 or more and finite, got -1\.0"),
        ({"en": float("nan")}, r"training\.mixture\.en must be 0 or more and finite, got nan"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(mixture: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rates(mixture, GROUPS)
