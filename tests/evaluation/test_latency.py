import json
from dataclasses import replace

import pytest

from hasten.evaluation.conditions import Conditions, Repetition
from hasten.evaluation.latency import GUESSING, energy_joules_per_token, over_time, speed, validity
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample

QUIET = Conditions(2.0, cores=2, contention_cores=0.02, steal_cores=0.0)


def samples(n: int, first: int = 0) -> list[Sample]:
    return [Sample(0.1, 0.01, 0.2 + 0.001 * i, 128, 11, 0.2 + 0.001 * i) for i in range(first, first + n)]


def repetitions(*sizes: int, conditions: Conditions = QUIET, **changes: object) -> list[Repetition]:
    """The first request of each follows the last of the one before."""
    conditions = replace(conditions, **changes)  # type: ignore[arg-type]
    return [Repetition(samples(n, sum(sizes[:i])), conditions) for i, n in enumerate(sizes)]


def test_every_figure_comes_with_its_interval_and_n():
    entry = speed(Qa(), repetitions(11, 10, 10, 10))
    assert (entry["validity"], entry["n"], entry["contention_cores"]) == ("valid", 41, pytest.approx(0.02))
    assert entry["latency_seconds_p50"] == pytest.approx(0.22)
    assert entry["decode_tokens_per_second"] == pytest.approx(100)
    assert entry["prefill_tokens_per_second"] == pytest.approx(1280)
    low, high = entry["ci95"]["latency_seconds_p50"]
    assert low < 0.22 < high
    assert entry["latency_seconds_p50"] < entry["latency_seconds_p90"] < 0.241
    assert entry["headline"] == "latency_seconds_p50"
    assert entry["figure_n"] == dict.fromkeys(entry["ci95"], 41)
    assert set(entry["why"]) == {"energy_joules_per_token", *GUESSING}
    json.dumps(entry)


def test_a_percentile_that_the_requests_cannot_support_is_null_with_the_reason():
    entry = speed(Qa(), repetitions(12, 12))
    assert entry["latency_seconds_p90"] is None
    assert entry["ci95"]["latency_seconds_p90"] is None
    assert entry["figure_n"]["latency_seconds_p90"] == 24
    assert "36 samples, got 24" in entry["why"]["latency_seconds_p90"]
    assert entry["latency_seconds_p50"] is not None


def test_every_repetition_is_recorded_with_its_conditions():
    first, second = repetitions(20, 20, why={"throttle_events": "no counters"})
    loud = replace(second, conditions=replace(second.conditions, contention_cores=0.8, seconds=6.0), attempts=3)
    entry = speed(Qa(), [first, loud])
    assert entry["validity"] == "noisy"
    assert "1 of 2 repetitions never got quiet; in number 2 other processes used 0.80 cores" in entry["why"]["validity"]
    assert [(one["n"], one["attempts"], one["quiet"]) for one in entry["repetitions"]] == [
        (20, 1, True),
        (20, 3, False),
    ]
    assert entry["repetitions"][1]["contention_cores"] == 0.8
    assert all("why" not in one for one in entry["repetitions"])
    assert entry["why"]["repetitions.throttle_events"] == "no counters"
    assert entry["contention_cores"] == pytest.approx((2 * 0.02 + 6 * 0.8) / 8)


@pytest.mark.parametrize(
    ("sizes", "contention", "expected"),
    [
        ((10, 10), 0.0, "valid"),
        ((10, 10), None, "valid"),
        ((10, 9), 0.0, "preview"),
        ((10, 10), 0.11, "noisy"),
        ((3, 2), 0.5, "noisy"),
    ],
)
def test_noise_and_too_few_requests_show_in_the_validity(sizes, contention, expected):
    verdict, why = validity(Qa(), repetitions(*sizes, contention_cores=contention))
    assert verdict == expected
    assert (why is None) == (expected == "valid")


def test_a_condition_that_is_known_in_part_of_the_time_is_its_mean_over_that():
    conditions = [Conditions(1.0, contention_cores=0.4), Conditions(5.0), Conditions(3.0, contention_cores=0.0)]
    assert over_time(conditions, "contention_cores") == pytest.approx(0.1)
    assert over_time(conditions, "steal_cores") is None


def test_guesses_are_told_over_all_requests_and_as_what_a_pass_gave():
    first, second = repetitions(10, 10)
    guessing = [replace(sample, guessed=8, accepted=5) for sample in first.samples]
    nothing = [replace(sample, guessed=0, accepted=0) for sample in second.samples]  # prompts that repeat nothing
    entry = speed(Qa(), [replace(first, samples=guessing), replace(second, samples=nothing)])
    passes = 10 * 5 + 10 * 10  # of the 10 tokens after the first, 5 came with others
    expected = {"acceptance_rate": 5 / 8, "tokens_per_pass": 200 / passes, "guesses_per_pass": 80 / passes}
    assert {name: entry[name] for name in GUESSING} == pytest.approx(expected)
    assert not {*GUESSING} & entry["why"].keys()


@pytest.mark.parametrize("guessed", [None, 0])
def test_where_nothing_is_guessed_the_acceptance_is_null_with_the_reason(guessed):
    parts = [Repetition([replace(sample, guessed=guessed, accepted=guessed) for sample in samples(20)], QUIET)]
    entry = speed(Qa(), parts)
    assert [entry[name] for name in GUESSING] == [None, None, None]
    assert [entry["why"][name] for name in GUESSING] == ["nothing was guessed"] * 3


def test_energy_is_that_of_the_repetitions_without_warm_up():
    first, second, third = repetitions(4, 3, 3, energy_joules=33.0, energy_source="RAPL package-0")
    first = replace(first, conditions=replace(first.conditions, energy_joules=900.0))
    joules, why = energy_joules_per_token(Qa(warmup=3), [first, second, third])
    assert (joules, why) == (pytest.approx(66 / (6 * 11)), None)
    joules, _ = energy_joules_per_token(Qa(warmup=0), [first, second, third])
    assert joules == pytest.approx(966 / (10 * 11))
    entry = speed(Qa(), [first, second, third])
    assert (entry["energy_joules_per_token"], entry["energy_source"]) == (pytest.approx(1.0), "RAPL package-0")


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        (repetitions(5, 5, why={"energy_joules": "no RAPL"}), "no RAPL"),
        (repetitions(10, energy_joules=3.0), "only repetition includes the warm-up"),
        ([], "no repetition was measured"),
        (repetitions(4, 0, energy_joules=3.0), "no token"),
        (
            [
                *repetitions(4, 3, energy_joules=3.0, energy_source="RAPL package-0"),
                *repetitions(3, energy_joules=3.0, energy_source="NVML"),
            ],
            "different counters",
        ),
    ],
)
def test_energy_that_was_not_read_is_null_with_the_reason(parts, complaint):
    joules, why = energy_joules_per_token(Qa(), parts)
    assert joules is None
    assert complaint in why
