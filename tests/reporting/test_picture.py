"""The picture is drawn whatever the verdict, and the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten.reporting.picture import draw, heading
from tests.reporting.conftest import Study


def test_the_same_study_gives_the_same_bytes(study: Study, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(study.measurements, study.verdict, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_labels_do_not_cover_each_other(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw(study.measurements, study.verdict, tmp_path / "a.png")
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts if text.get_text()]
    assert len(boxes) >= 8
    # A shared edge is legible; an overlap of more than a tenth of a label is not.
    for i, first in enumerate(boxes):
        for second in boxes[i + 1 :]:
            width = min(first.x1, second.x1) - max(first.x0, second.x0)
            height = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert width <= 0 or height <= 0 or width * height < 0.1 * first.width * first.height


def test_a_study_without_reference_is_drawn_with_the_reason(baseless: Study, tmp_path: Path) -> None:
    draw(baseless.measurements, baseless.verdict, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_the_heading_names_plan_machine_and_threads(study: Study) -> None:
    assert heading(study.verdict) == "Plan “default” on AMD EPYC 9V74 80-Core Processor, 2 threads"
    gpu = study.verdict | {"machine": {"cpu": "x", "gpu": ["NVIDIA H200"]}}
    assert heading(gpu) == "Plan “default” on NVIDIA H200"
    assert "unknown machine" in heading(study.verdict | {"machine": {}})
