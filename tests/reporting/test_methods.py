from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.artifacts import Json, read_json, write_json
from hasten.config import discover
from hasten.errors import UserError
from hasten.reporting.methods import making, methods, results, screened

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "methods.md"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def measured(variant: str, lineage: list[str], tpot: float | None, accuracy: float, **changes: Any) -> Json:
    return {
        "trial": f"{variant}-native", "variant": variant, "engine": "native", "status": "ok", "native": True,
        "lineage": lineage, "weight_bytes_per_token": 2_500_000, "speed": {"qa": {"tpot_seconds_p50": tpot}},
        "quality": {"sums": {"validation": {"accuracy": accuracy}}}, "bits_per_byte": None, **changes,
    }  # fmt: skip


def judged(found: list[Json], **confirmed: Any) -> Json:
    return {"plan": "mine", "scenarios": {"qa": {"confirmed": confirmed}}, "screened": screened(found, MADE)}


def record(method: str, seconds: float) -> Json:
    return {"tags": {"method": method}, "metrics": {"build_seconds": seconds}}


MADE = {"baseline": record("identity", 0.5), "shallow": record("depth", 2.0), "small": record("rtn", 0.25)}


def test_every_method_has_a_row_and_the_document_has_the_table() -> None:
    table = methods()
    assert [row[0] for row in cells(table)[2:]] == [f"`{name}`" for name in discover("compression")]
    assert all(all(row) for row in cells(table))
    assert table in DOCUMENT.read_text()


def test_the_document_has_the_results_of_the_committed_reports() -> None:
    for plan in ("methods", "default", "gemma3", "gemma3_methods"):
        assert results(read_json(ROOT / "reports" / plan / "verdict.json")) in DOCUMENT.read_text()


def test_a_chain_is_compared_with_the_unchanged_model_on_its_engine() -> None:
    found = [
        measured("baseline", ["baseline"], 2e-3, 0.8),
        measured("small", ["baseline", "shallow", "small"], 0.5e-3, 0.75),
        measured("baseline", ["baseline"], 1e-3, 0.9, engine="other", trial="baseline-other"),
    ]
    speedup = {"ratio": 3.5, "ci95": [3.25, 3.75]}
    verdict = judged(found, **{"small-native": {"speedup": speedup}, "baseline-native": {"speedup": None}})
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict
    assert cells(results(verdict)) == [
        ["variant", "made by", "engine", "MB read per token", "decoding", "confirmed", "sums", "seconds to make"],
        ["-"] * 8,
        ["`baseline`", "identity", "native", "2.50", "1.00x", "-", "80.0 (+0.0)", "0.5"],
        ["`small`", "identity > depth > rtn", "native", "2.50", "4.00x", "3.50x [3.25, 3.75]", "75.0 (-5.0)", "2.8"],
        ["`baseline`", "identity", "other", "2.50", "1.00x", "-", "90.0 (+0.0)", "0.5"],
    ]


def test_how_well_text_is_predicted_stands_beside_the_answers() -> None:
    found = [
        measured("baseline", ["baseline"], 1e-3, 0.8, bits_per_byte={"en": 2.0, "zh": 2.5}),
        measured("small", ["baseline", "small"], 1e-3, 0.8, bits_per_byte={"en": 2.0125}),
    ]
    head, _, *rows = cells(results(judged(found)))
    assert head[6:] == ["sums", "bits per byte, en", "bits per byte, zh", "seconds to make"]
    assert [row[7:9] for row in rows] == [["2.000 (+0.000)", "2.500 (+0.000)"], ["2.013 (+0.013)", "-"]]


def test_what_is_dequantised_has_answers_and_no_speed() -> None:
    found = [measured("baseline", ["baseline"], 1e-3, 0.8), measured("small", ["baseline", "small"], 1e-3, 0.7)]
    found[1]["native"] = False
    rows = cells(results(judged(found)))[2:]
    assert rows[0][:7] == ["`small`", "identity > rtn", "native (dequantised)", "-", "-", "-", "70.0 (-10.0)"]
    assert rows[1][4] == "1.00x"


def test_what_failed_or_was_not_asked_is_not_compared() -> None:
    more = {"more": {"validation": {"accuracy": 1.0}}}
    found = [
        measured("shallow", ["baseline", "shallow"], 1e-3, 0.7),  # without a baseline on this engine
        measured("baseline", ["baseline"], 1e-3, 0.7, status="failed"),
        measured("unrecorded", ["baseline", "unrecorded"], 1e-3, 0.7),
        measured("baseline", ["baseline"], 1e-3, 0.7, engine="other", quality=more),
        measured("small", ["baseline", "small"], None, 0.7, engine="other"),
    ]
    rows = cells(results(judged(found)))[2:]
    assert rows[0] == ["`shallow`", "identity > depth", "native", "2.50", "-", "-", "-", "70.0", "2.5"]
    assert [row[2] for row in rows] == ["native", "other", "other"]
    assert rows[1][4:8] == ["-", "-", "-", "70.0"]  # never timed
    assert rows[2][4:8] == ["1.00x", "-", "100.0 (+0.0)", "-"]


def test_a_report_of_before_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"verdict\.json of plan old must say what was screened: run its `report` again"
    ):
        results({"plan": "old", "scenarios": {}})


def test_records_of_compress_are_read_by_variant(tmp_path: Path) -> None:
    write_json(tmp_path / "compress-x.json", {"tags": {"variant": "baseline", "method": "identity"}})
    write_json(tmp_path / "evaluate-x.json", {"tags": {"variant": "baseline"}})
    assert making(tmp_path) == {"baseline": {"tags": {"variant": "baseline", "method": "identity"}}}
