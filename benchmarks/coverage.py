"""Do the intervals cover what they promise, the tests err as rarely as they say, the advice suffice? By simulation.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py                # 2,000 studies a row, ten minutes on one core
    python benchmarks/coverage.py --studies 300 --only "paired"    # quicker, rows whose name begins so

Every row invents studies of which the truth is known and asks the functions of `hasten.evaluation` for it. Prints the
table of `docs/measuring.md` and exits 1 if a row is out of bounds: 93 to 97% for a 95% interval (more only where a
handful of uneven clusters shows too little), at most 2.5% and twice the simulation's own error for a test at its
margin (more studies, as such rates are small), 72 to 88% where 80% was planned (80 pilots, 25 fresh studies each).
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import t

from hasten.evaluation.difference import decide, holm, non_inferiority_p, paired_difference
from hasten.evaluation.power import items_needed
from hasten.evaluation.speedup import rounds, rounds_needed
from hasten.evaluation.statistics import ALPHA, Decision, Estimate, accuracy, median, percentile

RESAMPLES = 1000
COVERAGE, ERROR, POWER = (0.93, 0.97), (0.0, ALPHA), (0.72, 0.88)
Array = np.ndarray[Any, Any]
Study = Callable[[np.random.Generator], float]
"""One simulated study: 1.0 if what the row counts happened, else 0.0 (or a share)."""


@dataclass(frozen=True)
class Row:
    name: str
    study: Study
    bounds: tuple[float, float] | None = COVERAGE
    more: float = 1.0  # times as many studies

    def run(self, studies: int) -> tuple[float, float, int]:
        """(rate, its standard error, studies)."""
        count = max(round(studies * self.more), 2)
        generator = np.random.default_rng([2026, *self.name.encode()])
        found = np.array([self.study(generator) for _ in range(count)])
        return float(found.mean()), float(found.std(ddof=1) / math.sqrt(count)), count


def covers(found: Any, truth: float) -> bool:
    return isinstance(found, Estimate) and found.low - 1e-12 <= truth <= found.high + 1e-12


def of_quantile(percent: float, n: int, heavy: bool = False) -> Study:
    """Log-normal latencies; heavy: one in ten is several times slower."""

    def shape(r: np.random.Generator, n: int) -> Array:
        slow = r.lognormal(1, 0.5, n) if heavy else np.ones(n)
        return r.lognormal(0, 0.3, n) * np.where(r.random(n) < 0.1, slow, 1)

    @cache
    def truth() -> float:
        return float(np.quantile(shape(np.random.default_rng(1), 4_000_000), percent / 100))

    def study(r: np.random.Generator) -> float:
        samples = shape(r, n).tolist()
        return covers(median(samples) if percent == 50 else percentile(samples, percent), truth())

    return study


def sizes(r: np.random.Generator, kind: str, clusters: int) -> Array:
    """Items per cluster. single: 1; equal: 4; geometric: 4 on average; uneven: log-normal, 5 on average, some of 30;
    mixed: an eighth of the clusters hold about 7 items, the others one (a task of conversations among others)."""
    if kind == "geometric":
        return r.geometric(0.25, clusters)
    if kind == "uneven":
        return np.maximum(1, np.round(r.lognormal(1.2, 0.9, clusters))).astype(int)
    if kind == "mixed":
        return np.concatenate([np.ones(clusters - clusters // 8, int), r.geometric(0.15, clusters // 8)])
    return np.full(clusters, {"single": 1, "equal": 4}[kind])


def of_accuracy(kind: str, clusters: int, low: float = 0.6, high: float = 0.95, icc: float = 0.3) -> Study:
    """A different accuracy in every study, between low and high; right answers cluster."""

    def study(r: np.random.Generator) -> float:
        truth, size = r.uniform(low, high), sizes(r, kind, clusters)
        spread = (1 - icc) / icc
        rate = r.beta(truth * spread, (1 - truth) * spread, clusters) if kind != "single" else np.full(clusters, truth)
        member = np.repeat(np.arange(clusters), size)
        scores = (r.random(len(member)) < rate[member]).astype(float)
        return covers(accuracy(scores.tolist(), member.tolist()), truth)

    return study


def of_tasks() -> Study:
    """The default plan's four tasks pooled: their accuracies differ, their numbers of items do not vary."""
    task = np.repeat(np.arange(4), [822, 472, 1200, 1500])
    rates = np.array([0.82, 0.27, 0.76, 0.82])[task]

    def study(r: np.random.Generator) -> float:
        scores = (r.random(len(rates)) < rates).astype(float).tolist()
        return covers(accuracy(scores, strata=task.tolist()), float(rates.mean()))

    return study


@dataclass(frozen=True)
class Pairs:
    """Studies of paired answers. lost, gained: shares of items that flip, or ranges to draw them from; icc: how flips
    cluster; longer: flips lost grow with the cluster's size (up to twice)."""

    kind: str
    clusters: int
    lost: float | tuple[float, float]
    gained: float | tuple[float, float]
    icc: float = 0.3
    longer: bool = False

    def draw(self, r: np.random.Generator, candidates: int = 1) -> tuple[Array, Array, float]:
        """(changes (candidates, items), cluster of each item, true difference). Several candidates share half of
        their flips' causes: where the reference happens to be right or wrong."""
        lost, gained = (r.uniform(*x) if isinstance(x, tuple) else x for x in (self.lost, self.gained))
        size = sizes(r, self.kind, self.clusters)
        member = np.repeat(np.arange(self.clusters), size)
        shared = self._flip(r, lost, gained, size)[member]
        shared = np.where((u := r.random(len(member))) < shared[:, 0], -1, np.where(u < shared.sum(1), 1, 0))
        rows = []
        for _ in range(candidates):
            own = self._flip(r, lost, gained, size)[member]
            change = np.where((u := r.random(len(member))) < own[:, 0], -1, np.where(u < own.sum(1), 1, 0))
            rows.append(np.where(r.random(len(member)) < 0.5, shared, change) if candidates > 1 else change)
        return np.array(rows), member, gained - lost

    def _flip(self, r: np.random.Generator, lost: float, gained: float, size: Array) -> Array:
        """Each cluster's own shares (lost, gained): Dirichlet around the common ones."""
        if self.kind == "single":
            return np.tile([lost, gained], (self.clusters, 1))
        shape = np.array([lost, gained, 1 - lost - gained]) * (1 - self.icc) / self.icc
        drawn = r.gamma(np.maximum(shape, 1e-12), size=(self.clusters, 3))
        drawn /= drawn.sum(1, keepdims=True)
        if self.longer:
            drawn[:, 0] = np.minimum(drawn[:, 0] * np.minimum(size / size.mean(), 2), 1 - drawn[:, 1])
        return drawn[:, :2]


def difference(change: Array, member: Array, seed: int = 0, resamples: int = RESAMPLES) -> Any:
    reference = (change < 0).astype(float)
    candidate = (reference + change).tolist()
    return paired_difference(candidate, reference.tolist(), member.tolist(), seed=seed, resamples=resamples)


def of_difference(pairs: Pairs) -> Study:
    @cache
    def over_items() -> float:
        """The truth where it is not that over clusters."""
        return float(replace(pairs, clusters=2_000_000).draw(np.random.default_rng(1))[0].mean())

    def study(r: np.random.Generator) -> float:
        changes, member, expected = pairs.draw(r)
        found = difference(changes[0], member, int(r.integers(2**31)))
        return covers(found.points, 100 * (over_items() if pairs.longer else expected))

    return study


def of_type_one(pairs: Pairs, candidates: int = 1, fine: int = 0, plain: bool = False) -> Study:
    """How often a candidate that loses exactly 2 points passes (any of them, after Holm). fine: further candidates
    that lose nothing, whose passing makes the others' tests easier. plain: with the sample's own variance alone."""
    test = plain_p if plain else non_inferiority_p

    def study(r: np.random.Generator) -> float:
        changes, member, _ = pairs.draw(r, candidates)
        p_values = [test(difference(change, member, resamples=1), 2.0) for change in changes]
        p_values += [1e-9] * fine
        return float(any(p < ALPHA for p in holm(p_values)[:candidates]))

    return study


def plain_p(found: Any, margin_points: float) -> float:
    """The textbook's test, for comparison: the cluster-robust variance of the sample, and no other."""
    if not found.standard_error:
        return 0.0  # no flips at all: it is sure of itself
    return float(t.sf((found.points.value + margin_points) / found.standard_error, found.degrees_of_freedom))


def of_independent(n: int, lost: float, gained: float) -> Study:
    """The same for independent items, of which only the numbers of flips matter: many studies in little time."""

    @cache
    def passes(down: int, up: int) -> float:
        change = np.repeat([-1, 1, 0], [down, up, n - down - up])
        return float(non_inferiority_p(difference(change, np.arange(n), resamples=1), 2.0) < ALPHA)

    return lambda r: passes(*r.multinomial(n, [lost, gained, 1 - lost - gained])[:2].tolist())


def of_languages(r: np.random.Generator) -> float:
    """Fine in English, at the margin of 3 points in Chinese (and within 2 pooled), three finalists after Holm."""
    english, chinese = Pairs("single", 900, 0.02, 0.02), Pairs("single", 600, 0.05, 0.02)
    (first, one, _), (second, two, _) = english.draw(r, 3), chinese.draw(r, 3)
    p_values = []
    for left, right in zip(first, second, strict=True):
        whole = difference(np.concatenate([left, right]), np.concatenate([one, two + 900]), resamples=1)
        parts = [difference(left, one, resamples=1), difference(right, two, resamples=1)]
        p_values.append(max(non_inferiority_p(whole, 2.0), *(non_inferiority_p(part, 3.0) for part in parts)))
    return float(any(p < ALPHA for p in holm(p_values)))


def of_power(parts: list[Pairs], tests: int = 1, fresh: int = 25) -> Study:
    """The share of fresh studies of n + items_needed items that decide, if a pilot's flips are the truth: a pilot that
    is undecided, and not for more than 20,000 items, is the population, of which they draw clusters. parts: one per
    language."""

    def once(r: np.random.Generator) -> float:
        while True:
            pilots = [pair.draw(r)[:2] for pair in parts]
            verdict, more = judged([(change[0], member) for change, member in pilots], tests)
            if verdict is Decision.undecided and more is not None and more <= 20_000:
                break
        n = sum(len(member) for _, member in pilots)
        growth = 1 + more / n
        decided = 0
        for _ in range(fresh):
            studies = [redrawn(r, change[0], member, growth) for change, member in pilots]
            decided += judged(studies, tests, advise=False)[0] is not Decision.undecided
        return decided / fresh

    return once


def redrawn(r: np.random.Generator, change: Array, member: Array, growth: float) -> tuple[Array, Array]:
    """Clusters of a pilot drawn with replacement until there are growth times its items."""
    size = np.bincount(member)
    start = np.concatenate([[0], np.cumsum(size)[:-1]])
    picks = r.integers(0, len(size), int(2 * growth * len(size)) + 20)
    picks = picks[: np.searchsorted(np.cumsum(size[picks]), round(growth * len(member))) + 1]
    fresh = np.repeat(np.arange(len(picks)), size[picks])  # which pick an item is of
    first = np.cumsum(size[picks]) - size[picks]
    items = start[picks][fresh] + np.arange(len(fresh)) - first[fresh]
    return change[items], fresh


def judged(studies: list[tuple[Array, Array]], tests: int, advise: bool = True) -> tuple[Decision, int | None]:
    """The decision at Holm's first step (margins 2 points pooled, 3 per language where there are several)."""
    offsets = np.cumsum([0, *(member.max() + 1 for _, member in studies[:-1])])
    parts = [difference(change, member, resamples=400) for change, member in studies]
    members = np.concatenate([member + offset for (_, member), offset in zip(studies, offsets, strict=True)])
    whole = difference(np.concatenate([change for change, _ in studies]), members, resamples=400)
    languages = {str(i): part for i, part in enumerate(parts)} if len(parts) > 1 else {}
    tested = [(whole, 2.0), *((part, 3.0) for part in languages.values())]
    p = tests * max(non_inferiority_p(*pair) for pair in tested)
    decisions = {decide(part, margin, p) for part, margin in tested}
    verdict = next(x for x in (Decision.inferior, Decision.non_inferior, Decision.undecided) if x in decisions)
    if not advise or verdict is not Decision.undecided:
        return verdict, None
    return verdict, items_needed(whole, 2.0, languages=languages, language_margin_points=3.0, tests=tests)


@dataclass(frozen=True)
class Machine:
    """How a speed-up is measured. process: spread of the logarithm from process to process (what rounds show), turn:
    of what drift leaves between two neighbouring turns, request: within a turn; mode: the machine's own speed, which
    both sides share; disturbed: share of turns that are slowed by a third or so, on one side only."""

    process: float = 0.02
    turn: float = 0.015
    request: float = 0.03
    mode: float = 0.2
    disturbed: float = 0.0
    passes: int = 8

    def play(self, r: np.random.Generator, count: int, log_ratio: float) -> list[list[Any]]:
        """Rounds of (reference, candidate): passes of values."""
        shape = (2, count, self.passes, 8)
        logs = r.normal(0, self.request, shape) + r.normal(0, self.process, (2, count, 1, 1))
        logs += r.normal(0, self.mode, (1, count, self.passes, 1)).cumsum(axis=2) / 2  # wanders from pass to pass
        logs += r.normal(0, self.turn, (2, count, self.passes, 1))
        logs += (r.random((2, count, self.passes, 1)) < self.disturbed) * np.abs(r.normal(0.3, 0.15, (*shape[:3], 1)))
        logs[0] += log_ratio
        values: list[list[Any]] = np.exp(logs).tolist()
        return values


def of_speedup(machine: Machine, first: int = 6, precision: float = 0.03, most: int = 20) -> Study:
    """Stein's interval, with as many rounds as it asks for, but never more than `most` (the time budget)."""

    def study(r: np.random.Generator) -> float:
        log_ratio = r.uniform(-0.2, 1.2)
        reference, candidate = machine.play(r, most, log_ratio)
        staged = rounds(reference[:first], candidate[:first], first_stage=first).log_ratios
        n = min(rounds_needed(staged, precision), most)
        found = rounds(reference[:n], candidate[:n], first_stage=first)
        return covers(found.estimate(), math.exp(log_ratio))

    return study


def of_bootstrap(machine: Machine, first: int = 6, most: int = 20, peek: bool = False) -> Study:
    """The percentile bootstrap of the rounds' mean instead; peek: stop as soon as it is within 3%."""

    def study(r: np.random.Generator) -> float:
        log_ratio = r.uniform(-0.2, 1.2)
        values = np.array(rounds(*machine.play(r, most, log_ratio), first_stage=first).log_ratios)
        for n in range(first, most + 1):
            draws = values[r.integers(0, n, (400, n))].mean(axis=1)
            low, high = np.quantile(draws, [ALPHA, 1 - ALPHA])
            if not peek or high - low < 2 * math.log(1.03):
                break
        return float(low <= log_ratio <= high)

    return study


def table() -> list[Row]:
    noisy, calm = Machine(process=0.04, turn=0.03, disturbed=0.1), Machine(process=0.005)
    margin = [(0.02, 0.0), (0.03, 0.01), (0.06, 0.04), (0.12, 0.10)]
    quantiles = ((50, 4), (50, 6), (50, 12), (50, 40), (90, 40), (90, 120), (99, 500))
    answers = (("equal", 100), ("geometric", 60), ("uneven", 40))
    kinds = (("geometric", 200), ("geometric", 800), ("uneven", 100), ("mixed", 400))
    even, lumpy = Pairs("single", 300, 0.05, 0.05), Pairs("geometric", 80, 0.04, 0.05)
    lumps = replace(lumpy, clusters=300, lost=0.06, gained=0.04)
    differences = {
        "800 items": Pairs("single", 800, 0.06, 0.04),
        "a language of 150": Pairs("single", 150, 0.06, 0.04),
        "0 to 3 flips of 300": Pairs("single", 300, (0, 0.01), (0, 0.01)),
        "1 to 12 lost of 600": Pairs("single", 600, (0.002, 0.02), 0.0),
        "100 equal clusters": Pairs("equal", 100, 0.05, 0.04, 0.5),
        "60 geometric clusters": Pairs("geometric", 60, 0.06, 0.04),
        "60 uneven clusters": Pairs("uneven", 60, 0.08, 0.06),
        "200 clusters, rare flips": Pairs("geometric", 200, (0, 0.01), (0, 0.01)),
        "few of 400 clusters large": Pairs("mixed", 400, 0.05, 0.04),
        "long clusters lose more": Pairs("geometric", 400, 0.04, 0.03, 0.2, longer=True),
    }
    singles = {f"{n} items, {x:.0%} lost {y:.0%} gained": (n, x, y) for n in (200, 1000) for x, y in margin}
    errors = {f"{n} {kind} clusters, {x:.0%} lost": Pairs(kind, n, x, y) for kind, n in kinds for x, y in margin[1:]}
    plain = {"200 items": Pairs("single", 200, 0.03, 0.01)}
    plain |= {f"{n} {kind} clusters": Pairs(kind, n, 0.03, 0.01) for kind, n in (("geometric", 200), ("uneven", 100))}
    powers: dict[str, tuple[list[Pairs], int]] = {
        "300 items": ([even], 1),
        "300 items, few flips": ([Pairs("single", 300, 0.01, 0.01)], 1),
        "80 geometric clusters": ([lumpy], 1),
        "beyond the margin": ([Pairs("single", 300, 0.12, 0.05)], 1),
        "3 finalists after Holm": ([even], 3),
        "3 finalists, clusters": ([lumpy], 3),
        "2 languages": ([even, Pairs("single", 200, 0.05, 0.05)], 1),
    }
    return [
        *(Row(f"p{q} of {n} samples", of_quantile(q, n)) for q, n in quantiles),
        *(Row(f"p{q} of {n}, one in ten slow", of_quantile(q, n, heavy=True)) for q, n in ((50, 40), (90, 120))),
        *(Row(f"accuracy, {n} items", of_accuracy("single", n)) for n in (40, 300)),
        *(Row(f"accuracy, {n} {kind} clusters", of_accuracy(kind, n)) for kind, n in answers),
        Row("accuracy, 4 tasks pooled", of_tasks()),
        *(Row(f"paired difference, {name}", of_difference(pairs)) for name, pairs in differences.items()),
        Row(
            "paired difference, 15 uneven clusters", of_difference(Pairs("uneven", 15, 0.08, 0.06)), (COVERAGE[0], 1.0)
        ),
        Row("speed-up, calm machine", of_speedup(calm)),
        Row("speed-up, wandering machine", of_speedup(Machine())),
        Row("speed-up, a tenth of turns disturbed", of_speedup(noisy)),
        Row("speed-up, disturbed, 4 first rounds", of_speedup(noisy, first=4)),
        Row("speed-up, disturbed, time for 3 rounds", of_speedup(noisy, first=3, most=3)),
        Row("speed-up, wandering, to 1.5%", of_speedup(Machine(), precision=0.015)),
        Row("for comparison: bootstrap of 4 rounds", of_bootstrap(Machine(), first=4), None),
        Row("for comparison: bootstrap of 6 rounds", of_bootstrap(Machine()), None),
        Row("for comparison: bootstrap of 4, until narrow", of_bootstrap(noisy, first=4, peek=True), None),
        *(Row(f"type I, {name}", of_independent(*single), ERROR, 50) for name, single in singles.items()),
        *(Row(f"type I, {name}", of_type_one(pairs), ERROR, 2.5) for name, pairs in errors.items()),
        *(
            Row(f"for comparison: type I of the plain test, {name}", of_type_one(pairs, plain=True), None)
            for name, pairs in plain.items()
        ),
        Row("type I, 3 finalists after Holm", of_type_one(Pairs("single", 1000, 0.05, 0.03), 3), ERROR, 2.5),
        Row("type I, 3 finalists, clusters", of_type_one(lumps, 3), ERROR, 2.5),
        Row("type I, 1 of 3 at the margin", of_type_one(lumps, 1, 2), ERROR, 2.5),
        Row("type I, 3 finalists, one language", of_languages, ERROR, 2.5),
        *(Row(f"power, {name}", of_power(*planned), POWER, 0.04) for name, planned in powers.items()),
    ]


def within(row: Row, rate: float, error: float) -> bool:
    low, high = row.bounds or (0.0, 1.0)
    return low - 1e-9 <= rate <= high + 1e-9 + (2 * error if row.bounds is ERROR else 0.0)


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--studies", type=int, default=2000)
    options.add_argument("--only", default="", help="rows whose name begins so")
    chosen = options.parse_args()
    holm([0.5, 0.5])
    gc.freeze()  # statsmodels collects garbage in every call; let it find little
    failed, begun = [], time.perf_counter()
    print("| simulated | studies | rate | simulation error | bounds |\n| --- | ---: | ---: | ---: | ---: |")
    for row in table():
        if row.name.startswith(chosen.only):
            rate, error, count = row.run(chosen.studies)
            bounds = "" if row.bounds is None else f"{100 * row.bounds[0]:g} to {100 * row.bounds[1]:g}%"
            good = within(row, rate, error)
            cells = [row.name, f"{count:,}", f"{rate:.1%}", f"{error:.2%}", bounds + ("" if good else " MISSED")]
            print(f"| {' | '.join(cells)} |", flush=True)
            failed += [] if good else [row.name]
    print(f"\n{time.perf_counter() - begun:.0f} s; out of bounds: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
