import operator
import os
from collections.abc import Iterator
from functools import partial

import pytest

from hasten.corpus.parallel import ordered_map

double = partial(operator.mul, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(ordered_map(double, range(20), workers)) == list(range(0, 40, 2))


def test_only_a_few_chunks_are_in_flight() -> None:
    drawn: list[int] = []

    def chunks() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    results = ordered_map(double, chunks(), 2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(drawn) <= 6


def test_an_exception_in_a_worker_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(partial(operator.floordiv, 1), [1, 0, 1], 2))


def test_a_worker_that_dies_is_an_error_not_a_hang() -> None:
    from concurrent.futures.process import BrokenProcessPool

    with pytest.raises(BrokenProcessPool):
        list(ordered_map(os._exit, [3], 2))
