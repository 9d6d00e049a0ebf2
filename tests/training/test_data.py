from __future__ import annotations

import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Tokens, read_json, write_json
from hasten.errors import UserError
from hasten.training.data import Batch, PackedTokens, Rehearsed, Share, TaskBatches
from tests.tiny import write_tokens
from tests.training.test_task_batches import batches, numbered

TOKENS = 1003
SHARES = [(1, 1), (2, 1), (1, 3), (3, 2)]
"""Processes and passes per step."""


def written(folder: Path, lengths: list[int], groups: list[tuple[str, str, int]]) -> Tokens:
    """A train split in which every token says where it stands; documents of those lengths, groups of so many tokens."""
    tokens = write_tokens(folder, train=sum(lengths), validation=20)
    np.arange(sum(lengths), dtype=np.uint16).tofile(tokens.path / "train.bin")
    np.save(tokens.path / "train.offsets.npy", np.cumsum([0, *lengths]))
    facts = read_json(tokens.path / "manifest.json")
    facts["groups"] = [
        {"source": source, "language": language, "splits": {"train": {"tokens": size}}}
        for source, language, size in groups
    ]
    write_json(tokens.path / "manifest.json", facts)
    return Tokens(folder)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Documents of 2 to 40 tokens, three groups whose borders documents respect."""
    lengths, generator = [], np.random.default_rng(0)
    sizes = (400, 300, 303)
    for size in sizes:
        while size:
            length = min(size, int(generator.integers(2, 41)))
            length = size if size - length == 1 else length
            lengths.append(length)
            size -= length
    names = [("chat", "en"), ("news", "en"), ("news", "zh")]
    folder = tmp_path_factory.mktemp("data") / "tokens"
    return written(folder, lengths, [(*name, size) for name, size in zip(names, sizes, strict=True)])


def packed(tokens: Tokens, **changes: Any) -> PackedTokens:
    options: dict[str, Any] = {"steps": 90, "batch_size": 3, "length": 10, "seed": 0, **changes}
    return PackedTokens(tokens, "train", **options)


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def together(parts: list[Batch], name: str) -> list[Any]:
    """The rows of several passes, in an order that does not depend on how they were shared."""
    return sorted(row for part in parts for row in part[name].tolist())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), indices=st.lists(st.integers(0, 89), min_size=1, max_size=8))
def test_a_pre_training_batch_is_a_pure_function_of_seed_and_index(
    tokens: Tokens, seed: int, indices: list[int]
) -> None:
    used = packed(tokens, seed=seed, mixture={"zh": 2.0})
    for index in indices:  # whatever was asked for before, in whatever order
        assert same(used[index], packed(tokens, seed=seed, mixture={"zh": 2.0})[index])


def test_every_sequence_comes_once_an_epoch_in_an_order_of_its_own(tokens: Tokens) -> None:
    data = packed(tokens, batch_size=7)  # 100 sequences: the 15th batch takes 5 rows from the next epoch
    drawn = np.concatenate([data.starts(step) for step in range(29)]) // 10
    first, second = drawn[:100], drawn[100:200]
    assert sorted(first) == sorted(second) == list(range(100))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first[:7], packed(tokens, batch_size=7, seed=1).starts(0) // 10)


def test_a_pre_training_batch_holds_whole_slices_of_the_stream_and_scores_all_but_the_first_token(
    tokens: Tokens,
) -> None:
    batch = packed(tokens, apart=False)[5]
    assert batch.keys() == {"ids", "weights", "prompt_tokens", "total"}
    assert batch["ids"].shape == batch["weights"].shape == (3, 10)
    assert batch["ids"].dtype is torch.int64
    starts = batch["ids"][:, 0]
    assert (starts % 10 == 0).all()
    assert torch.equal(batch["ids"] - starts[:, None], torch.arange(10).expand(3, 10))
    assert torch.equal(batch["weights"], torch.tensor([0.0] + [1.0] * 9).expand(3, 10))
    assert ((batch["prompt_tokens"] >= 1) & (batch["prompt_tokens"] <= 5)).all()
    assert batch["total"].dtype is torch.float32 and batch["total"] == 27


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 90), index=st.integers(0, 89), encodes=st.booleans(), seed=st.integers(0, 9))
def test_documents_are_told_apart_and_none_is_predicted_from_another(
    tokens: Tokens, length: int, index: int, encodes: bool, seed: int
) -> None:
    batch = packed(tokens, length=length, seed=seed, encodes_prompt=encodes)[index]
    offsets = set(tokens.offsets("train").tolist())
    for ids, weights, documents, prompt in zip(
        *(batch[name].tolist() for name in ("ids", "weights", "documents", "prompt_tokens")), strict=True
    ):
        document = 0
        for place, token in enumerate(ids):  # a token is its own place in the stream
            document += place > 0 and token in offsets
            assert documents[place] == document
            counts = place > 0 and token not in offsets and not (encodes and place < prompt)
            assert weights[place] == counts
    assert batch["documents"].dtype is torch.int32
    assert batch["total"] == max(1, batch["weights"].sum())


@pytest.mark.parametrize(("ranks", "accumulate"), SHARES)
@pytest.mark.parametrize("apart", [True, False])
def test_the_shares_of_a_step_are_its_rows_and_know_the_weight_of_all(
    tokens: Tokens, ranks: int, accumulate: int, apart: bool
) -> None:
    options = {"batch_size": 12, "apart": apart, "encodes_prompt": not apart}
    whole = packed(tokens, **options)
    shares = [packed(tokens, share=Share(rank, ranks, accumulate), **options) for rank in range(ranks)]
    assert all(len(share) == 90 * accumulate for share in shares)
    for step in (0, 8):
        passes = [share[step * accumulate + i] for share in shares for i in range(accumulate)]
        assert {tuple(one["ids"].shape) for one in passes} == {(12 // ranks // accumulate, 10)}
        for name in whole[step].keys() - {"total"}:
            assert together(passes, name) == together([whole[step]], name)
        assert all(one["total"] == whole[step]["weights"].sum() for one in passes)


def test_a_batch_that_does_not_divide_among_its_shares_is_refused(tokens: Tokens) -> None:
    message = r"batch_size must be a multiple of training\.accumulate \(2\) times .* \(3\), got 8"
    with pytest.raises(UserError, match=message):
        packed(tokens, batch_size=8, share=Share(0, 3, 2))
    with pytest.raises(UserError, match=message):
        batches(numbered([5] * 9), batch_size=8, share=Share(0, 3, 2))


def test_a_mixture_shows_groups_as_often_as_their_size_and_rate_say_and_cuts_each_by_itself(tokens: Tokens) -> None:
    data = packed(tokens, steps=256, batch_size=8, mixture={"zh": 3.0, "chat": 0.5})
    starts = np.concatenate([data.starts(step) for step in range(256)])
    borders = np.array([0, 400, 700, 1003])
    group = np.searchsorted(borders, starts, side="right") - 1
    assert (starts + 10 <= borders[group + 1]).all()  # no row goes on into the next group
    sizes = np.array([40 * 0.5, 30, 30 * 3])
    assert np.abs(np.bincount(group) - sizes / sizes.sum() * len(starts)).max() <= 2
    for number in range(3):  # each of its sequences equally often, to within one
        assert np.ptp(np.unique(starts[group == number], return_counts=True)[1]) <= 1


def test_a_group_with_rate_zero_is_never_seen(tokens: Tokens) -> None:
    data = packed(tokens, mixture={"news/en": 0.0})
    starts = np.concatenate([data.starts(step) for step in range(90)])
    assert not ((starts >= 400) & (starts < 700)).any()
    assert len(np.unique(starts)) == 70  # the other two are one pool: all 270 draws are whole epochs but the last


def test_neighbours_of_one_rate_are_one_stream_so_that_small_groups_are_read_too(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", [6, 8, 6], [("a", "en", 6), ("b", "en", 8), ("c", "zh", 6)])
    assert sorted(packed(tokens, batch_size=2, length=10).starts(0)) == [0, 10]
    assert sorted(packed(tokens, batch_size=2, length=7, mixture={"en": 2.0, "c": 2.0}).starts(0)) == [0, 7]
    message = "sequence_length must fit c/zh of the train split, got 7 for 6 tokens"
    with pytest.raises(UserError, match=message):
        packed(tokens, length=7, mixture={"en": 2.0})


def test_a_split_shorter_than_a_sequence_is_refused_with_both_lengths(tokens: Tokens) -> None:
    with pytest.raises(UserError, match="sequence_length must fit the train split, got 2000 for 1003 tokens"):
        packed(tokens, length=2000)


def test_a_data_set_goes_to_another_process_without_its_text(tokens: Tokens) -> None:
    data = packed(tokens, steps=3, mixture={"zh": 2.0})
    before = [data[index] for index in range(3)]
    sent = pickle.dumps(data)
    assert len(sent) < 4000
    assert all(same(one, other) for one, other in zip(before, pickle.loads(sent), strict=False))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what it was advised")
def test_the_system_is_told_that_the_text_is_read_here_and_there(tokens: Tokens) -> None:
    data = packed(tokens)
    assert data[0] and isinstance(tokens.ids("train").base, mmap.mmap)
    for name in ("train.bin", "train.offsets.npy"):
        entries = Path("/proc/self/smaps").read_text().split(str(tokens.path / name))[1:]
        flags = [entry.partition("VmFlags: ")[2].splitlines()[0].split() for entry in entries]
        assert any("rr" in one for one in flags)  # reads ahead less: random read advice


def test_a_step_in_which_nothing_counts_is_not_divided_by_nothing(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", [1, 2, 2, 1], [("a", "en", 6)])  # rows of an end and a beginning
    batch = packed(tokens, length=2)[0]
    assert not batch["weights"].any()
    assert batch["total"] == 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_rehearsed_text_has_its_share_of_every_steps_weight_however_it_is_split(
    tokens: Tokens, packing: bool, apart: bool, share: float
) -> None:
    def made(part: Share) -> Rehearsed:
        tasks = batches(numbered([5, 9, 14, 3, 8, 20, 4, 11]), batch_size=4, packing=24 * packing, share=part)
        return Rehearsed(tasks, packed(tokens, length=12, batch_size=2, apart=apart, share=part), share)

    for index in range(5):
        whole, halves = made(Share())[index], [made(Share(rank, 2))[index] for rank in (0, 1)]
        tasks = made(Share()).tasks[index]
        count, width = tasks["ids"].shape
        cut = min(width, 12)
        assert whole["ids"].shape == whole["weights"].shape == (count + 2, width)
        assert len(whole["prompt_tokens"]) == count + 2
        assert torch.equal(whole["ids"][:count], tasks["ids"])
        assert (whole["ids"][count:, :cut].diff(dim=1) == 1).all()  # text is a slice of the stream
        assert (whole["ids"][count:, cut:] == 2).all() and not whole["weights"][count:, cut:].any()
        assert float(whole["weights"].sum()) == pytest.approx(float(whole["total"]), rel=1e-6)
        assert float(whole["weights"][count:].sum() / whole["total"]) == pytest.approx(share, rel=1e-5)
        assert ("documents" in whole) == (apart or packing)
        if "documents" in whole:
            assert (whole["documents"][count:, cut:] == -1).all()
            text = made(Share()).text.batch(index, cut)
            rows = [whole["documents"][:count], whole["documents"][count:, :cut]]
            for own, batch in zip(rows, (tasks, text), strict=True):
                assert own.tolist() == batch.get("documents", torch.zeros_like(batch["ids"])).tolist()
        for name in whole.keys() - {"total"}:
            assert together(halves, name) == together([whole], name)
        assert halves[0]["total"] == halves[1]["total"] == whole["total"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_rehearsal_of_nothing_or_of_nothing_else_is_refused(tokens: Tokens, share: float) -> None:
    with pytest.raises(UserError, match=f"rehearsal must lie between 0 and 1, got {share}"):
        Rehearsed(batches(numbered([5])), packed(tokens), share)


def test_task_batches_of_any_kind_are_data_sets_of_their_own_kind(tokens: Tokens) -> None:
    tasks = batches(numbered([5, 6]))
    assert isinstance(tasks, TaskBatches)
    assert len(Rehearsed(tasks, packed(tokens), 0.5)) == len(tasks)


def test_few_rows_of_text_may_fall_to_some_shares_alone(tokens: Tokens) -> None:
    def made(part: Share) -> Rehearsed:
        text = packed(tokens, batch_size=3, share=part, even_shares=False)
        return Rehearsed(batches(numbered([5, 9, 14, 3]), batch_size=4, share=part), text, 0.3)

    whole, shares = made(Share()), [made(Share(rank, 2, 2)) for rank in (0, 1)]
    for step in range(3):
        passes = [share[2 * step + i] for share in shares for i in (0, 1)]
        assert sorted(len(one["ids"]) for one in passes) == [1, 2, 2, 2]
        for name in ("ids", "weights", "documents", "prompt_tokens"):
            assert together(passes, name) == together([whole[step]], name)
        assert len({float(one["total"]) for one in passes}) == 1
