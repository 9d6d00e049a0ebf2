"""One study, reported in every form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from hasten.evaluation.decision import confirmed
from hasten.evaluation.selection import select
from hasten.reporting.verdict import verdict
from tests.study import STUDY, Made, confirmation, frames, measurements

Json = dict[str, Any]


@dataclass
class Study:
    measurements: list[Json]
    finalists: Json
    confirmation: Json
    verdict: Json

    @property
    def entry(self) -> Json:
        return self.verdict["scenarios"]["qa"]


def run(study: tuple[Made, ...] = STUDY, items: int = 600, **changes: Json) -> Study:
    """The whole way from measurements to a verdict. changes: what to overwrite in a confirmed trial, by variant."""
    measured = measurements(study)
    margins = {"margin_points": 2.0, "language_margin_points": 3.0}
    chosen = select(measured, frames(study), plan="default", scenarios=["qa"], **margins)
    raw, answers = confirmation(chosen, study, items=items)
    for variant, change in changes.items():
        raw["scenarios"]["qa"]["trials"][f"{variant}@llamacpp"] |= change
    made = verdict(measured, chosen, confirmed(raw, answers, chosen), titles={"qa": "real-time QA"})
    return Study(measured, chosen, raw, made)


@pytest.fixture(scope="session")
def study() -> Study:
    return run()


@pytest.fixture(scope="session")
def kept() -> Study:
    """Too few items to prove anything: the reference stays."""
    return run(items=60)


@pytest.fixture(scope="session")
def baseless() -> Study:
    """No float baseline: no verdict."""
    return run(STUDY[2:4])
