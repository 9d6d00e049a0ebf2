"""Names with units become headings, numbers three digits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.reporting.units import digits, quantity


@pytest.mark.parametrize(
    ("figure", "label", "unit", "value", "shown"),
    [
        ("ttft_seconds_p50", "TTFT (median)", "ms", 0.01234, "12.3"),
        ("latency_seconds_p90", "latency p90", "ms", 1.5, "1,500"),
        ("decode_tokens_per_second", "decode", "tokens/s", 98.14, "98.1"),
        ("requests_per_second", "requests", "requests/s", 2.0, "2.00"),
        ("artifact_bytes", "artifact", "MB", 27.5e6, "27.5"),
        ("some_figure", "some figure", "", 0.0, "0"),
    ],
)
def test_figures_become_headings(figure: str, label: str, unit: str, value: float, shown: str) -> None:
    found = quantity(figure)
    assert (found.label, found.unit, found.show(value)) == (label, unit, shown)


def test_the_unknown_is_a_dash() -> None:
    assert quantity("ttft_seconds_p50").show(None) == "–"


@given(st.floats(1e-6, 1e12))
def test_three_digits_are_kept(value: float) -> None:
    text = digits(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=5.1e-3)
