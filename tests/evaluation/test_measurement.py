from pathlib import Path

import pytest

from hasten.artifacts import read_json, write_json
from hasten.evaluation.measurement import measurement
from hasten.evaluation.trial import Job, Outcome
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.fakes import FakeEngine, write_variant

MACHINE = {"id": "abc", "cpu": "a CPU", "gpu": [], "cores": 2, "libraries": {"fake": "1.0"}}
CONTRACT = {
    "schema", "trial", "variant", "engine", "status", "error", "lineage", "machine", "kernel", "artifact_bytes",
    "weight_bytes_per_token", "peak_memory_bytes", "load_seconds", "compile_seconds", "build", "quality",
    "bits_per_byte", "speed", "ceilings", "mbu", "mfu", "why", "native", "headline", "method", "grid",
}  # fmt: skip


@pytest.fixture
def job(tmp_path) -> Job:
    variant = write_variant(tmp_path / "int8", lineage=["baseline", "int8"], method="rtn", grid={"bits": 8})
    (variant / "model.safetensors").write_bytes(b"x" * 77)
    write_json(tmp_path / "tasks" / "quiz" / "manifest.json", {"schema": 1, "language": "en", "baselines": None})
    empty = Path("unused")
    return Job(
        "int8@fakes", variant, FakeEngine(threads=2), tmp_path / "tasks", empty, empty, empty, scenarios={"qa": Qa()}
    )


def rows(output: str = "w7") -> list[dict]:
    row = {"task": "quiz", "split": "validation", "item_id": "a", "cluster_id": "c", "language": "en", "expected": "w7"}
    return [{**row, "output": output, "correct": float(output == "w7"), "output_tokens": 2}]


def finished() -> Outcome:
    return Outcome(
        "ok",
        kernel="Q8_0",
        native=True,
        native_format="Q8_0",
        load_seconds=0.5,
        compile_seconds=1.5,
        weight_bytes_per_token=1000,
        memory={"weights": 900, "kv_cache": None},
        predictions=rows(),
        samples={"qa": [Sample(0.1, 0.02, 0.5, 128, 21, 0.5)] * 40},
        contention={"qa": 0.01},
        why={"peak_memory_bytes": "not readable here"},
    )


def test_a_measurement_keeps_the_contract_and_is_plain_json(job, tmp_path):
    record = measurement(job, finished(), machine=MACHINE, reference=("baseline@eager", rows("other")))
    write_json(tmp_path / "m.json", record)
    assert read_json(tmp_path / "m.json") == record
    assert record.keys() >= CONTRACT
    assert (record["trial"], record["variant"], record["engine"]) == ("int8@fakes", "int8", "fakes")
    assert (record["lineage"], record["method"], record["artifact_bytes"]) == (["baseline", "int8"], "rtn", 77)
    assert record["machine"] == {"id": "abc", "cpu": "a CPU", "gpu": [], "threads": 2, "libraries": {"fake": "1.0"}}
    assert record["quality"]["quiz"]["validation"]["accuracy"] == 1.0
    assert record["speed"]["qa"]["validity"] == "valid"
    assert record["speed"]["qa"][record["headline"]["qa"]] == 0.5
    assert record["agreement"] == {"reference": "baseline@eager", "share": 0.0, "n": 1}


def test_what_was_not_measured_is_null_with_the_reason(job):
    record = measurement(job, finished(), machine=MACHINE)
    for name in ("bits_per_byte", "ceilings", "mbu", "mfu", "build", "agreement", "peak_memory_bytes"):
        assert record[name] is None
        assert record["why"][name]
    assert record["why"]["memory.kv_cache"] == "the engine does not say"


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_trial_that_did_not_work_has_the_same_shape(job, status):
    record = measurement(job, Outcome(status, "a reason"), machine=MACHINE, reference=("baseline@eager", rows()))
    assert record.keys() >= CONTRACT
    assert (record["status"], record["error"]) == (status, "a reason")
    assert (record["quality"], record["speed"], record["agreement"]) == ({}, {}, None)
    assert record["why"]["speed"] == f"the trial {status}"
