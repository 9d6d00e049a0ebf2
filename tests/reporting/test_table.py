"""The terminal's table."""

from __future__ import annotations

import io

from rich.console import Console

from hasten.reporting.table import summary
from tests.reporting.conftest import Study
from tests.study import STUDY


def printed(study: Study, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary(study.measurements, study.verdict, titles={"qa": "real-time QA"}))
    return console.export_text()


def test_it_shows_every_trial_and_the_verdict(study: Study) -> None:
    lines = printed(study).splitlines()
    for made in STUDY:
        assert any(made.trial in line for line in lines)
    champion = next(line for line in lines if "int8@llamacpp" in line and "champion" in line)
    assert "2.26x" in champion and "63." in champion
    assert any("failed: it was still running after 600 s" in line for line in lines)
    assert "accuracy non-inferior at 2 points" in " ".join(lines)


def test_it_fits_a_terminal_of_80_columns(study: Study) -> None:
    assert max(map(len, printed(study, 80).splitlines())) <= 80


def test_a_study_without_verdict_has_a_table(baseless: Study, kept: Study) -> None:
    assert "no verdict for real-time QA" in printed(baseless)
    assert "reference, kept" in printed(kept)
