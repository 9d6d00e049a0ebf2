"""The page stands alone and holds what the files hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from hasten.reporting.page import bars, render, speed_table, stage_rows, write
from tests.reporting.conftest import Study
from tests.study import STUDY

VOID = {"meta", "img", "br"}
STAGES = {
    "pretrain": {"seconds": 268.0, "budget_seconds": 300},
    "finetune": {"seconds": 96.0, "budget_seconds": 90},
    "select": {"seconds": 2.0, "budget_seconds": None},
}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return " ".join(parser.text.split())


def test_it_holds_every_trial_task_reason_and_baseline(study: Study) -> None:
    text = text_of(render(study.measurements, study.verdict, b"png", titles={"qa": "real-time QA"}, stages=STAGES))
    for made in STUDY:
        assert made.trial in text
    for reason in study.entry["rejected"].values():
        assert reason in text
    for words in (
        "question_type",
        "TF-IDF + regression",
        "83.0",
        "baseline → depth → depth-int8",
        "2,400",
        "xllamacpp",
    ):
        assert words in text
    assert "No latency p90: p90 needs at least 36 samples, got 24." in text
    assert "268" in text and "300" in text


def test_guesses_have_a_column_where_any_trial_made_some(study: Study) -> None:
    assert "guesses" not in text_of(render(study.measurements, study.verdict, b""))
    first, *others = study.measurements
    guessing = first | {"speed": {"qa": first["speed"]["qa"] | {"acceptance_rate": 0.6254}}}
    before = others[0] | {
        "speed": {"qa": {k: v for k, v in others[0]["speed"]["qa"].items() if k != "acceptance_rate"}}
    }
    text = text_of(render([guessing, before, *others[1:]], study.verdict, b""))
    assert "guessesright%" in text
    assert "62.5" in text


def test_it_needs_no_network_and_runs_no_script(study: Study) -> None:
    page = render(study.measurements, study.verdict, b"png")
    assert not re.search(r"https?://|<script|<link|url\(", page)
    assert "data:image/png;base64,cG5n" in page


def test_it_escapes_what_it_is_given(study: Study) -> None:
    verdict = study.verdict | {"plan": "<script>alert(1)</script>"}
    assert "<script" not in render(study.measurements, verdict, b"png")


def test_a_study_without_champion_or_without_verdict_has_a_page(kept: Study, baseless: Study) -> None:
    assert "the reference is kept" in text_of(render(kept.measurements, kept.verdict, b""))
    assert "No verdict for real-time QA" in text_of(render(baseless.measurements, baseless.verdict, b""))


def test_trials_that_all_failed_have_a_page(baseless: Study) -> None:
    nothing = {"status": "failed", "error": "it crashed", "speed": {}, "pooled": {}, "quality": {}, "agreement": None}
    failed = [measured | nothing for measured in baseless.measurements]
    assert "failed" in text_of(render(failed, baseless.verdict, b""))


def test_it_is_written_beside_the_picture(study: Study, tmp_path: Path) -> None:
    (tmp_path / "frontier.png").write_bytes(b"png")
    write(study.measurements, study.verdict, tmp_path / "frontier.png", tmp_path / "report.html", stages=STAGES)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frontier.png", "report.html"]


def test_bars_lie_within_their_axis(study: Study) -> None:
    found = bars(study.entry, 2.0)
    assert [bar["trial"] for bar in found] == ["depth-int8@llamacpp", "int8@llamacpp"]
    for bar in (b[kind] for b in found for kind in ("speedup", "accuracy")):
        assert 0 <= bar["left"] <= bar["dot"] <= bar["left"] + bar["width"] <= 100
        assert 0 <= bar["zero"] <= 100


def test_stages_over_their_budget_are_marked() -> None:
    rows = {row["name"]: row for row in stage_rows(STAGES)}
    assert rows["finetune"]["over"] and not rows["pretrain"]["over"] and not rows["select"]["over"]
    assert rows["pretrain"]["limit"] == 100.0 and rows["select"]["limit"] is None


def test_speed_rows_are_fastest_first(study: Study) -> None:
    table = speed_table(study.measurements, "qa")
    assert table["rows"][0]["measurement"]["trial"] == "depth-int4@llamacpp"
    assert [column.label for column in table["columns"]][:2] == ["latency (median)", "TTFT (median)"]
    assert list(table["missing"]) == ["latency p90"]
