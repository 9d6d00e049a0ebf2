"""What a scenario is: a way a model is used, turned into a load that is measured.

A scenario is given a loaded engine and a source of prompts, sends requests in its own pattern
(one after another, at random arrivals, all at once) and hands back one sample per request. It also
says which figures of those samples it is judged by; the confidence intervals are added above
(`hasten.evaluation.latency`), the same way for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from hasten.engine.base import Session
from hasten.errors import UserError
from hasten.scenario.prompts import PromptSource
from hasten.scenario.timing import Sample

Report = Callable[[int, int], None]
"""Called with (requests done, requests in all) while a scenario runs."""

LEAST = {
    "requests": 1,
    "warmup": 0,
    "repetitions": 1,
    "minimum_requests": 1,
    "patience_seconds": 0,
    "turn_requests": 1,
    "turn_warmup": 0,
}
"""The least value of every option that all scenarios have."""


@dataclass(frozen=True)
class Figure:
    """One number of a scenario: a percentile (0 to 100) of one value per request."""

    values: tuple[float, ...]
    percentile: float = 50.0


@dataclass
class Scenario(ABC):
    """Options every scenario has.

    requests: how many are timed. warmup: how many run before them at the same shape, untimed.
    repetitions: into how many parts the timed requests are divided; each has its own conditions, and only the ones
    that were disturbed are measured again. minimum_requests: a result from fewer is a `preview`.
    patience_seconds: what measuring disturbed parts again may take in all; of each part the least disturbed attempt
    counts. turn_requests, turn_warmup: the same as `requests` and `warmup` for one turn of a confirmation, in which
    variants take short turns side by side.
    """

    requests: int = 40
    warmup: int = 3
    repetitions: int = 4
    minimum_requests: int = 20
    patience_seconds: float = 20.0
    turn_requests: int = 4
    turn_warmup: int = 1

    title: ClassVar[str]
    """What the scenario is called in sentences."""
    headline: ClassVar[str]
    """The value per request that variants are compared by; its median is the figure `<headline>_p50`."""
    lower_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field, least in LEAST.items():
            if getattr(self, field) < least:
                raise UserError(f"{field} must be at least {least}, got {getattr(self, field)}")

    @property
    def name(self) -> str:
        """The scenario's one name: its file, its YAML, its tag."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def headline_figure(self) -> str:
        """The figure variants are ranked by."""
        return f"{self.headline}_p50"

    @property
    @abstractmethod
    def context_tokens(self) -> int:
        """Tokens of prompt and completion together that the longest request needs."""

    @abstractmethod
    def measure(self, session: Session, prompts: PromptSource, seed: int, report: Report) -> list[Sample]:
        """Warm up, then run the timed requests. The seed decides the prompts."""

    @abstractmethod
    def figures(self, samples: Sequence[Sample]) -> dict[str, Figure]:
        """What is reported, by name with its unit; `headline_figure` is one of them."""

    def parts(self) -> list[Self]:
        """The scenario in `repetitions` parts of about equal length, at most one per request.

        The first ones get one request more where they do not divide evenly. Only the first one warms up: the others
        follow at once in the same session. Give each part its own seed (`part_seed`), so that no prompt returns.
        """
        count = min(self.repetitions, self.requests)
        least, more = divmod(self.requests, count)
        return [
            replace(self, requests=least + (part < more), warmup=self.warmup if part == 0 else 0, repetitions=1)
            for part in range(count)
        ]

    def turn(self) -> Self:
        """The scenario as short as a turn of a confirmation."""
        return replace(self, requests=self.turn_requests, warmup=self.turn_warmup, repetitions=1)

    def headline_values(self, samples: Sequence[Sample]) -> list[float]:
        """The headline's value for every request."""
        return list(self.figures(samples)[self.headline_figure].values)

    def describe(self) -> dict[str, Any]:
        """The options, for the record."""
        return {"scenario": self.name, **vars(self)}


def part_seed(seed: int, part: int) -> int:
    """The seed of a part's prompts: its own for every part of every seed; the first part keeps the seed itself."""
    return seed + part * 1_000_003
