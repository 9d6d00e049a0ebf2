"""Speed: what a scenario's samples say, with how sure we are of it and under which conditions.

Every figure is a percentile of one value per request, with its n and its 95% interval; one that so few
requests cannot support is null, with the reason beside it. The verdict on the whole is its validity:
`noisy` if a repetition never got quiet, `preview` if there were too few requests, `valid` otherwise.
Energy is told per generated token, from counters only. Where an engine guesses tokens ahead, it is told how often it
was right.
"""

from __future__ import annotations

from collections.abc import Sequence

from hasten.artifacts import Json
from hasten.evaluation.conditions import Conditions, Repetition
from hasten.evaluation.statistics import Estimate, Unknown, median, percentile
from hasten.scenario.base import Figure, Scenario
from hasten.scenario.timing import Sample

NO_REPETITION = "no repetition was measured"
GUESSING = ("acceptance_rate", "tokens_per_pass", "guesses_per_pass")


def speed(scenario: Scenario, repetitions: Sequence[Repetition]) -> Json:
    """One entry of a measurement's `speed`: validity, n, the figures by name, their `ci95`, `figure_n` and `why`.

    repetitions: the kept ones, in the order of `scenario.parts()`. `contention_cores` and `steal_cores` are means over
    time. `repetitions` has every one's n, attempts, quiet and conditions.
    """
    samples = [sample for repetition in repetitions for sample in repetition.samples]
    conditions = [repetition.conditions for repetition in repetitions]
    figures = scenario.figures(samples)
    estimates = {name: estimate(figure) for name, figure in figures.items()}
    known = {name: value for name, value in estimates.items() if isinstance(value, Estimate)}
    verdict, reason = validity(scenario, repetitions)
    joules, unknown_energy = energy_joules_per_token(scenario, repetitions)
    sources = {one.energy_source for one in conditions if one.energy_source}
    why = {name: value.why for name, value in estimates.items() if isinstance(value, Unknown)}
    why |= {"validity": reason} if reason else {}
    why |= {"energy_joules_per_token": unknown_energy} if unknown_energy else {}
    guesses = guessing(samples)
    why |= {name: "nothing was guessed" for name, value in guesses.items() if value is None}
    for one in conditions:
        why |= {f"repetitions.{name}": text for name, text in one.why.items()}
    return {
        "validity": verdict,
        "n": len(samples),
        "headline": scenario.headline_figure,
        "lower_is_better": scenario.lower_is_better,
        **{name: known[name].value if name in known else None for name in estimates},
        "ci95": {name: known[name].ci95 if name in known else None for name in estimates},
        "figure_n": {name: len(figure.values) for name, figure in figures.items()},
        "contention_cores": over_time(conditions, "contention_cores"),
        "steal_cores": over_time(conditions, "steal_cores"),
        "energy_joules_per_token": joules,
        "energy_source": None if joules is None else " ".join(sorted(sources)),
        **guesses,
        "repetitions": [_repetition(repetition) for repetition in repetitions],
        "options": scenario.describe(),
        "why": why,
    }


def estimate(figure: Figure) -> Estimate | Unknown:
    """A figure with its interval, `Unknown` if there are too few values for it."""
    if figure.percentile == 50:
        return median(figure.values)
    return percentile(figure.values, figure.percentile)


def validity(scenario: Scenario, repetitions: Sequence[Repetition]) -> tuple[str, str | None]:
    """(`noisy`, `preview` or `valid`, why). A condition that could not be read does not count as noise; it is null."""
    disturbed = [(part, one.conditions) for part, one in enumerate(repetitions, start=1) if not one.conditions.quiet]
    if disturbed:
        worst, conditions = max(disturbed, key=lambda pair: pair[1].disturbance)
        return "noisy", f"{len(disturbed)} of {len(repetitions)} repetitions never got quiet; in number {worst} " + (
            ", ".join(conditions.disturbances)
        )
    requests = sum(len(repetition.samples) for repetition in repetitions)
    if requests < scenario.minimum_requests:
        return "preview", f"{requests} requests, fewer than minimum_requests ({scenario.minimum_requests})"
    return "valid", None


def over_time(conditions: Sequence[Conditions], name: str) -> float | None:
    """The mean of a condition over the time of the repetitions in which it is known; None if in none of them."""
    known = [(one.seconds, getattr(one, name)) for one in conditions if getattr(one, name) is not None]
    seconds = sum(length for length, _ in known)
    return sum(length * value for length, value in known) / seconds if seconds > 0 else None


def energy_joules_per_token(scenario: Scenario, repetitions: Sequence[Repetition]) -> tuple[float | None, str | None]:
    """(joules per generated token, prefill included, None), or (None, why not).

    Of the repetitions without warm-up, whose energy is that of their samples alone.
    """
    counted = repetitions[1:] if scenario.warmup else repetitions
    if not counted:
        return None, "the only repetition includes the warm-up" if repetitions else NO_REPETITION
    tokens = sum(sample.output_tokens for repetition in counted for sample in repetition.samples)
    if not tokens:
        return None, "no token was generated"
    joules = 0.0
    for repetition in counted:
        conditions = repetition.conditions
        if conditions.energy_joules is None:
            return None, conditions.why.get("energy_joules", "the energy is unknown")
        joules += conditions.energy_joules
    if len(sources := {repetition.conditions.energy_source for repetition in counted}) > 1:
        return None, f"the repetitions' energy comes from different counters: {sorted(map(str, sources))}"
    return joules / tokens, None


def guessing(samples: Sequence[Sample]) -> dict[str, float | None]:
    """How well an engine guessed in these requests, whose first token is none of it; None where it did not guess.

    acceptance_rate: the share of guessed tokens that were right; one after a wrong one counts as wrong.
    tokens_per_pass: what a reading of the weights gave, 1 without guesses. guesses_per_pass: how many it checked.
    """
    guessed, accepted = (sum(getattr(sample, name) or 0 for sample in samples) for name in ("guessed", "accepted"))
    if not guessed:
        return dict.fromkeys(GUESSING)
    tokens = sum(sample.output_tokens - 1 for sample in samples)
    passes = tokens - accepted  # each gives one token that nobody guessed
    return dict(zip(GUESSING, (accepted / guessed, tokens / passes, guessed / passes), strict=True))


def _repetition(repetition: Repetition) -> Json:
    conditions = repetition.conditions.to_json()
    del conditions["why"]  # once for all of them, in the entry's own
    return {
        "n": len(repetition.samples),
        "attempts": repetition.attempts,
        "quiet": repetition.conditions.quiet,
        **conditions,
    }
