import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import UserError
from hasten.task.base import SPLITS, Item
from hasten.task.splitting import choose, split_of, unambiguous


def items(count: int, per_cluster: int = 1) -> list[Item]:
    return [Item(f"i{n}", f"c{n // per_cluster}", "en", f"prompt {n}", "x") for n in range(count)]


def test_shares_are_as_declared() -> None:
    splits = [split_of(f"cluster {n}") for n in range(4000)]
    assert 0.72 < splits.count("train") / 4000 < 0.78
    assert 0.085 < splits.count("validation") / 4000 < 0.115
    assert 0.13 < splits.count("test") / 4000 < 0.17


@given(st.lists(st.tuples(st.text(), st.text()), unique_by=lambda pair: pair[0], max_size=50))
def test_every_item_is_in_one_split_and_clusters_stay_together(pairs: list[tuple[str, str]]) -> None:
    every = [Item(name, cluster, "en", "", "") for name, cluster in pairs]
    by_split = {split: list(choose(every, split, 0)) for split in SPLITS}
    assert sorted(item.id for chosen in by_split.values() for item in chosen) == sorted(item.id for item in every)
    clusters = [{item.cluster for item in chosen} for chosen in by_split.values()]
    assert sum(map(len, clusters)) == len(set().union(*clusters))


def test_order_and_choice_do_not_depend_on_the_order_of_the_source() -> None:
    every = items(200)
    assert list(choose(every, "train", 20)) == list(choose(every[::-1], "train", 20))
    assert list(choose(every, "train", 20)) == list(choose(every, "train", 0))[:20]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="split must be one of"):
        list(choose(items(3), "dev", 0))


def test_near_copies_count_once_and_contradictions_are_dropped() -> None:
    pairs = [("Good!", "pos"), ("good", "pos"), ("So so.", "pos"), ("so so", "neg"), ("so so", "pos"), ("!?", "neg")]
    assert unambiguous(pairs) == {"good": ("Good!", "pos")}
