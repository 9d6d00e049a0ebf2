"""The simulations of `benchmarks/coverage.py`, a few hundred studies each: enough to notice what is badly wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
ROWS = (
    "p50 of 12 samples",
    "p90 of 40 samples",
    "accuracy, 60 geometric clusters",
    "paired difference, 0 to 3 flips of 300",
    "paired difference, 60 geometric clusters",
    "speed-up, a tenth of turns disturbed",
    "type I, 200 items, 3% lost 1% gained",
    "type I, 200 geometric clusters, 6% lost",
    "power, beyond the margin",
)


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ROWS)
def test_rates_are_within_bounds_as_far_as_few_studies_show(coverage: ModuleType, name: str) -> None:
    row = next(row for row in coverage.table() if row.name == name)
    rate, error, _ = row.run(300)
    low, high = row.bounds
    assert low - 2.5 * max(error, 0.009) <= rate <= high + 2.5 * max(error, 0.009)


def test_the_bootstrap_of_few_rounds_covers_too_little(coverage: ModuleType) -> None:
    row = next(row for row in coverage.table() if row.name == "for comparison: bootstrap of 4 rounds")
    assert row.run(200)[0] < 0.88
