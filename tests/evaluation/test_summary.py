"""What the table of runs shows of a measurement."""

from __future__ import annotations

import pytest

from hasten.evaluation.summary import figures, tell
from tests.study import STUDY, measurement


@pytest.mark.parametrize(("rate", "words"), [(None, ""), (0.62, ", 62% of guesses right")])
def test_how_often_guesses_were_right_is_a_figure_and_part_of_the_line(
    capsys: pytest.CaptureFixture[str], rate: float | None, words: str
) -> None:
    record = {**measurement(STUDY[0]), "mbu": None, "mfu": None}
    record["speed"]["qa"]["acceptance_rate"] = rate
    assert figures(record)["qa_acceptance_rate"] == rate
    tell(record)
    line = capsys.readouterr().err
    assert f"tokens/s decode{words} (" in line
