from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hasten.artifacts import Variant, read_json, write_json
from hasten.evaluation.conditions import Repetition
from hasten.evaluation.measurement import measurement
from hasten.evaluation.trial import Job, Outcome
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.fakes import FakeEngine, write_variant
from tests.study import CEILINGS, QUIET, STUDY, continuations

MACHINE = {"id": "abc", "cpu": "a CPU", "gpu": [], "cores": 2, "libraries": {"fake": "1.0"}}
CONTRACT = {
    "schema", "trial", "variant", "engine", "status", "error", "lineage", "machine", "kernel", "artifact_bytes",
    "weight_bytes_per_token", "peak_memory_bytes", "load_seconds", "compile_seconds", "build", "quality",
    "bits_per_byte", "speed", "ceilings", "mbu", "mfu", "why", "native", "headline", "method", "grid",
    "bits_per_byte_ci95", "continuation", "bound", "roofline", "arithmetic", "affinity", "kv_bytes_per_position",
    "peak_memory_apart_from_kv_bytes", "peak_gpu_memory_bytes",
}  # fmt: skip
PREDICTED = {
    "languages": {"en": {"value": 1.7, "ci95": [1.6, 1.8], "n": 30}, "zh": {"value": None, "ci95": None, "n": 0}},
    "why": {"bits_per_byte.zh": "no document"},
}


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
        kv_bytes_per_position=10,
        arithmetic="int8",
        affinity=[0, 1],
        speed={"qa": [Repetition([Sample(0.1, 0.02, 0.5, 128, 64, 0.5)] * 10, QUIET)] * 4},
        continuations=continuations(STUDY[2]),
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


@dataclass
class Drafted(FakeEngine):
    def draft_of(self, variant: Variant) -> Variant:
        return Variant(variant.path.with_name("small"))


def test_a_draft_is_recorded_with_its_hash_and_what_its_guesses_read(job):
    assert measurement(job, finished(), machine=MACHINE)["draft"] is None
    drafted = replace(job, engine=Drafted())
    refused = Outcome("refused", "there is no small")
    assert measurement(drafted, refused, machine=MACHINE)["draft"] == {
        "variant": "small", "hash": None, "weight_bytes_per_guess": None
    }  # fmt: skip
    small = write_variant(job.variant.with_name("small"))
    outcome = replace(finished(), weight_bytes_per_guess=70)
    record = measurement(drafted, outcome, machine=MACHINE, ceilings=CEILINGS)
    assert record["draft"] == {"variant": "small", "hash": Variant(small).hash, "weight_bytes_per_guess": 70}
    assert record["ceilings"]["working_set_bytes"] == 1000 + 10 * (128 + 32) + 70


class Converting(FakeEngine):
    converts = True


def test_what_an_engine_rounds_by_itself_has_neither_the_variants_score_nor_its_size(job):
    record = measurement(replace(job, engine=Converting()), finished(), machine=MACHINE, predicted=PREDICTED)
    assert (record["converted"], record["bits_per_byte"], record["artifact_bytes"]) == (True, None, 900)
    assert record["why"]["bits_per_byte"].endswith(f"that {Converting().name} makes: not scored")
    failed = measurement(replace(job, engine=Converting()), Outcome("failed", "x"), machine=MACHINE)
    assert failed["why"]["artifact_bytes"] == f"{Converting().name} made none"
    plain = measurement(job, finished(), machine=MACHINE, predicted=PREDICTED)
    assert (plain["converted"], plain["bits_per_byte"]["en"], plain["artifact_bytes"]) == (False, 1.7, 77)


def test_what_lies_beyond_short_answers_is_recorded(job):
    record = measurement(job, finished(), machine=MACHINE, predicted=PREDICTED)
    assert record["bits_per_byte"] == {"en": 1.7, "zh": None}
    assert record["bits_per_byte_ci95"]["en"] == [1.6, 1.8]
    assert record["why"]["bits_per_byte.zh"] == "no document"
    assert record["continuation"]["n"] == 8
    assert record["continuation"]["languages"]["zh"]["bits_per_byte"] > 0


def test_the_limits_come_from_the_machine_s_ceilings(job):
    record = measurement(job, finished(), machine=MACHINE, ceilings=CEILINGS)
    decode = record["roofline"]["qa"]["decode"]
    assert decode["bytes"] == 1000 + 10 * (128 + 32)
    assert record["mbu"] == pytest.approx(decode["bytes"] / 1.8e11 / 0.02)
    assert record["mfu"] is None and record["why"]["mfu"]  # the fakes' model has no shape, and int8 no ceiling
    assert record["ceilings"]["dram_read_bytes_per_second"] == 4.2e10
    assert "decode" in record["roofline"]["qa"]["why"]


def test_memory_is_told_apart_from_the_reserved_cache(job):
    outcome = finished()
    outcome.peak_memory_bytes, outcome.memory["kv_cache"] = 1000, 300
    assert measurement(job, outcome, machine=MACHINE)["peak_memory_apart_from_kv_bytes"] == 700
    record = measurement(job, finished(), machine=MACHINE)
    assert record["peak_memory_apart_from_kv_bytes"] is None
    assert record["why"]["peak_memory_apart_from_kv_bytes"] == "the peak is unknown"


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
