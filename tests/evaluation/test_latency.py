import pytest

from hasten.evaluation.latency import speed, validity
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample


def samples(n: int) -> list[Sample]:
    return [Sample(0.1, 0.01, 0.2 + 0.001 * i, 128, 11, 0.2 + 0.001 * i) for i in range(n)]


def test_every_figure_comes_with_its_interval_and_n():
    entry = speed(Qa(), samples(41), contention=0.02)
    assert (entry["validity"], entry["n"], entry["contention_cores"]) == ("valid", 41, 0.02)
    assert entry["latency_seconds_p50"] == pytest.approx(0.22)
    assert entry["decode_tokens_per_second"] == pytest.approx(100)
    assert entry["prefill_tokens_per_second"] == pytest.approx(1280)
    low, high = entry["ci95"]["latency_seconds_p50"]
    assert low < 0.22 < high
    assert entry["latency_seconds_p50"] < entry["latency_seconds_p90"] < 0.241
    assert entry["headline"] == "latency_seconds_p50"
    assert entry["why"] == {}


def test_a_percentile_that_the_requests_cannot_support_is_null_with_the_reason():
    entry = speed(Qa(), samples(24), contention=None)
    assert entry["latency_seconds_p90"] is None
    assert entry["ci95"]["latency_seconds_p90"] is None
    assert "36 samples, got 24" in entry["why"]["latency_seconds_p90"]
    assert entry["latency_seconds_p50"] is not None


@pytest.mark.parametrize(
    ("requests", "contention", "expected"),
    [
        (20, 0.0, "valid"),
        (20, None, "valid"),
        (19, 0.0, "preview"),
        (20, 0.11, "noisy"),
        (5, 0.5, "noisy"),
    ],
)
def test_noise_and_too_few_requests_show_in_the_validity(requests, contention, expected):
    assert validity(Qa(), requests, contention) == expected
