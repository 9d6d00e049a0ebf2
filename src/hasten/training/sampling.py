"""Which item is drawn when: arithmetic, so that no order is ever kept and every draw can be asked for by its number.

To shuffle a corpus one would permute a list of its sequences: 80 GB of numbers for 10^10 of them, and a state to save
with every checkpoint. Here an order is a *function* instead, a keyed bijection of range(n) in no memory: a Feistel
network, the construction behind DES, scrambles numbers of 2b bits whatever its round function is, and where that range
is larger than n, a number that falls outside is scrambled again until it falls inside ("cycle walking"; Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", doi:10.1007/3-540-45760-7_9). A new key for every epoch is a new
order.

`Mixture` does the same for groups that are to be seen more or less often than their size says. So what the millionth
step sees is known without the 999,999 before it, to any process, after any interruption.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hasten.errors import UserError

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio: what keeps numbers that differ by little apart before they are mixed."""
BLOCK = 1024
"""Draws that are shuffled among each other; at the end of each block every group has had its share."""
PARTS = 2**26
"""Shares are multiples of 1 / PARTS: fine enough for a share of one in a million, and 10^11 draws still fit 64 bits."""

Numbers = int | np.ndarray


def permuted(index: Numbers, n: int, key: Numbers) -> np.ndarray:
    """Where a permutation of range(n) puts `index`, (I,) int64. Another key is another permutation.

    index: numbers in range(n), (I,) or one. key: one for all, or one for each, (I,).
    """
    values = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    assert (values < n).all()
    keys = np.broadcast_to(np.atleast_1d(np.asarray(key)).astype(np.uint64), values.shape)
    bits = max(1, ((n - 1).bit_length() + 1) // 2)  # in each half: the network permutes range(4 ** bits), 4n at most
    out = _scrambled(values, keys, bits)
    while (outside := np.flatnonzero(out >= n)).size:
        out[outside] = _scrambled(out[outside], keys[outside], bits)
    return out.astype(np.int64)


def _scrambled(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of range(4 ** bits), (I,) uint64: each round adds to one half what the key makes of the other."""
    mask = np.uint64((1 << bits) - 1)
    left, right = values >> np.uint64(bits), values & mask
    for number in range(ROUNDS):
        left, right = right, left ^ (_mixed(right ^ (keys + np.uint64(number * GOLDEN % 2**64))) & mask)
    joined: np.ndarray = left << np.uint64(bits) | right
    return joined


def keyed(*numbers: Numbers) -> np.ndarray:
    """A number that looks random and depends on nothing but `numbers`, (I,) uint64."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _mixed((state ^ np.atleast_1d(np.asarray(number)).astype(np.uint64)) + np.uint64(GOLDEN))
    return state


def _mixed(state: np.ndarray) -> np.ndarray:
    """A permutation of 64 bits in which each output bit depends on each input bit (SplitMix64's finaliser; Steele, Lea
    and Flood 2014, doi:10.1145/2660193.2660195).
    """
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


class Mixture:
    """An endless stream of draws from groups of items: which group, and which of its items.

    sizes: items of each group. rates: how often an item of a group is drawn, relative to the others; 0 leaves a group
    out. A group's share of the draws is its size times its rate over the sum of these. It is kept not on average but
    exactly: after any whole number of blocks each group has had its share to within (groups + 1) / 2 draws, also one
    with a share of a hundredth of a draw per block. Each group comes up in an order of its own, every item once before
    any comes again. With one group that is all: draw i is item i % size of the epoch's order.
    """

    def __init__(self, sizes: Sequence[int], rates: Sequence[float], seed: int) -> None:
        shares = np.array([size * rate for size, rate in zip(sizes, rates, strict=True)], np.float64)
        assert shares.min() >= 0 and shares.sum() > 0
        self.sizes, self.seed = list(sizes), seed
        parts = np.maximum(np.rint(shares / shares.sum() * PARTS), 1).astype(np.int64)
        self.parts = np.where(shares > 0, parts, 0)
        self.left = self.parts[::-1].cumsum()[::-1]  # of a group and those behind it
        self.several = int((self.parts > 0).sum()) > 1

    def draw(self, index: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """The group of each draw, and its number among the draws from that group: (I,) int64 each."""
        rest = np.atleast_1d(np.asarray(index, np.int64))
        if self.several:
            block, place = np.divmod(rest, BLOCK)
            rest = block * BLOCK + permuted(place, BLOCK, keyed(self.seed, 0, block))
        group, nth = np.full_like(rest, -1), np.zeros_like(rest)
        # The first group takes its share of the draws as evenly as whole numbers allow, the second its share of the
        # rest, and so on. Each count grows by 0 or 1 with a draw, so whose it grows by 1 has that draw.
        for number, (part, left) in enumerate(zip(self.parts.tolist(), self.left.tolist(), strict=True)):
            before, after = ((draws * part + left // 2) // left if part else 0 * draws for draws in (rest, rest + 1))
            taken = (group < 0) & (after > before)
            group[taken], nth[taken] = number, before[taken]
            rest = rest - before
        return group, nth

    def item(self, index: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """The group of each draw, and the item in that group: (I,) int64 each."""
        group, nth = self.draw(index)
        item = np.empty_like(nth)
        for number in np.unique(group).tolist():
            own = group == number
            epoch, place = np.divmod(nth[own], self.sizes[number])
            item[own] = permuted(place, self.sizes[number], keyed(self.seed, 1, number, epoch))
        return group, item


@dataclass(frozen=True)
class Stretches:
    """Pieces of a token stream that are cut into sequences of `length` tokens and drawn equally often.

    starts: the first token of each, (S,). ends: sequences in it and those before it, (S,).
    """

    starts: np.ndarray
    ends: np.ndarray
    length: int

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int]], length: int) -> Stretches:
        """pieces: the first token of each and one past its last; what is too short for a sequence is left out."""
        sequences = np.cumsum([(end - start) // length for start, end in pieces])
        return cls(np.array([start for start, _ in pieces]), sequences, length)

    def first_tokens(self, sequence: np.ndarray) -> np.ndarray:
        """Where sequences begin, (I,) int64."""
        stretch = np.searchsorted(self.ends, sequence, side="right")
        before = np.append(0, self.ends)[stretch]
        found: np.ndarray = self.starts[stretch] + (sequence - before) * self.length
        return found


def rates(mixture: Mapping[str, float], groups: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """How often the tokens of each group, (source or task, language), are to be seen relative to those of a rate of 1.

    mixture: factors by source or task (`chitchat`), language (`en`) or both (`chitchat/en`); those that concern a group
    multiply. Raises `UserError` for a name that no group has, for factors that are no rates, and if nothing is left.
    """
    found = dict.fromkeys(groups, 1.0)
    names = {group: {*filter(None, group), "/".join(group)} for group in found}
    for name, factor in mixture.items():
        if not (math.isfinite(factor) and factor >= 0):
            raise UserError(f"training.mixture.{name} must be 0 or more and finite, got {factor}")
        concerned = [group for group in found if name in names[group]]
        if not concerned:
            known = ", ".join(sorted({one for every in names.values() for one in every} - {"/"}))
            raise UserError(f"training.mixture must name groups that there are ({known or 'none'}), got {name!r}")
        for group in concerned:
            found[group] *= factor
    if not any(found.values()):
        raise UserError(f"training.mixture must leave at least one group above 0, got {dict(mixture)}")
    return found
