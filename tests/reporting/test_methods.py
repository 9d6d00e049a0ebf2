from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.artifacts import Json, write_json
from hasten.config import discover
from hasten.reporting.methods import load, methods, results

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def measured(variant: str, lineage: list[str], tpot: float, accuracy: float, **changes: Any) -> Json:
    return {
        "trial": variant, "variant": variant, "engine": "native", "status": "ok", "native": True, "lineage": lineage,
        "weight_bytes_per_token": 2_500_000, "speed": {"qa": {"tpot_seconds_p50": tpot}},
        "quality": {"sums": {"validation": {"accuracy": accuracy}}}, **changes,
    }  # fmt: skip


def record(method: str, seconds: float) -> Json:
    return {"tags": {"method": method}, "metrics": {"build_seconds": seconds}}


MADE = {"baseline": record("identity", 0.5), "shallow": record("depth", 2.0), "small": record("rtn", 0.25)}


def test_every_method_has_a_row_and_the_document_has_the_table() -> None:
    table = methods()
    assert [row[0] for row in cells(table)[2:]] == [f"`{name}`" for name in discover("compression")]
    assert all(all(row) for row in cells(table))
    assert table in DOCUMENT.read_text()


def test_a_chain_is_compared_with_the_unchanged_model_on_its_engine() -> None:
    found = [
        measured("baseline", ["baseline"], 2e-3, 0.8),
        measured("small", ["baseline", "shallow", "small"], 0.5e-3, 0.75),
        measured("baseline", ["baseline"], 1e-3, 0.9, engine="other"),
    ]
    assert cells(results(found, MADE)) == [
        ["variant", "made by", "engine", "MB read per token", "decoding", "sums", "seconds to make"],
        ["-"] * 7,
        ["`baseline`", "identity", "native", "2.50", "1.00x", "80.0 (+0.0)", "0.5"],
        ["`small`", "identity > depth > rtn", "native", "2.50", "4.00x", "75.0 (-5.0)", "2.8"],
        ["`baseline`", "identity", "other", "2.50", "1.00x", "90.0 (+0.0)", "0.5"],
    ]


def test_what_failed_or_is_dequantised_or_was_not_asked_is_not_compared() -> None:
    found = [
        measured("shallow", ["baseline", "shallow"], 1e-3, 0.7),  # without a baseline on this engine
        measured("baseline", ["baseline"], 1e-3, 0.7, status="failed"),
        measured("small", ["baseline", "small"], 1e-3, 0.7, native=False),
        measured(
            "baseline", ["baseline"], 1e-3, 0.7, engine="other", quality={"more": {"validation": {"accuracy": 1.0}}}
        ),
    ]
    rows = cells(results(found, MADE))[2:]
    assert rows[0] == ["`shallow`", "identity > depth", "native", "2.50", "-", "-", "70.0", "2.5"]
    assert [row[2] for row in rows] == ["native", "other"]
    assert rows[1][5:7] == ["100.0 (+0.0)", "-"]


def test_a_plans_folder_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "measurements" / "a.json", measured("baseline", ["baseline"], 1e-3, 0.7))
    write_json(tmp_path / "runs" / "compress-x.json", {"tags": {"variant": "baseline", "method": "identity"}})
    write_json(tmp_path / "runs" / "evaluate-x.json", {"tags": {"variant": "baseline"}})
    measurements, made = load(tmp_path)
    assert [m["trial"] for m in measurements] == ["baseline"]
    assert made["baseline"]["tags"]["method"] == "identity"
