"""A plan in which trials fail in every way there is: each is recorded with its reason, the rest gets its verdict."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.smoke.conftest import environment

ENGINE = '''"""Our own decoder, sabotaged."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hasten.artifacts import Variant, replacing
from hasten.engine.eager import Eager, EagerSession


class Fault(Enum):
    segfault = "segfault"
    hang = "hang"
    allocate = "allocate"
    logits = "logits"
    disk = "disk"


@dataclass
class Faulty(Eager):
    fault: Fault = Fault.segfault

    def load(self, variant: Variant, cache: Path) -> EagerSession:
        session = super().load(variant, cache)
        if self.fault is Fault.segfault:
            ctypes.string_at(0)
        while self.fault is Fault.hang:
            pass
        held = []
        while self.fault is Fault.allocate:
            held.append(b"x" * 2**24)
        if self.fault is Fault.logits:
            next(session.model.parameters()).data.fill_(float("nan"))
        if self.fault is Fault.disk:
            with replacing(cache / "faulty" / variant.hash) as temporary:
                temporary.mkdir()
                (temporary / "model.half").write_text("half a model")
                with Path("/dev/full").open("w") as full:
                    full.write("the other half")
        return session
'''
LIMITS = {"hang": "timeout_seconds=30", "allocate": "memory_limit_gib=1.5"}
REASONS = {
    "segfault": "the process crashed (SIGSEGV) while loading",
    "hang": "it was still loading after 30 s and was stopped",
    "allocate": "it used more than memory_limit_gib (1.5 GiB) while loading and was stopped",
    "logits": "RuntimeError: request 0: the logits are not finite",
    "disk": "could not be written: no space left on the device",
}
WELL = ["baseline-eager", "baseline-llamacpp", "int8-llamacpp"]


@pytest.fixture(scope="module")
def sabotaged(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished repository with another engine and a trial for each way in which it fails."""
    target = tmp_path_factory.mktemp("sabotaged") / "repository"
    shutil.copytree(finished, target, symlinks=True)
    for name in ("mlflow.db", "mlruns"):  # they name the folder they were made in
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (target / "src/hasten/engine/faulty.py").write_text(ENGINE)
    options = (target / "conf/engine/eager.yaml").read_text().replace("base_eager", "base_faulty")
    (target / "conf/engine/faulty.yaml").write_text(f"{options}fault: segfault\n")
    plan = yaml.safe_load((target / "params.yaml").read_text())
    shape = plan["trials"]["baseline-eager"]["set"]
    plan["trials"] = {trial: plan["trials"][trial] for trial in WELL}
    for fault in REASONS:
        more = f"{shape} engine.fault={fault} {LIMITS.get(fault, '')}"
        plan["trials"][f"faulty-{fault}"] = {"variant": "baseline", "engine": "faulty", "set": more.strip()}
    (target / "params.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return target


@pytest.mark.slow
def test_every_failure_is_recorded_and_the_rest_gets_its_verdict(sabotaged: Path) -> None:
    done = subprocess.run(
        ["dvc", "repro"], cwd=sabotaged, env=environment(), capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
    for fault, reason in REASONS.items():
        measured = json.loads((sabotaged / f"artifacts/miniature/measurements/faulty-{fault}.json").read_text())
        assert measured["status"] == "failed"
        assert reason in measured["error"], fault
        assert measured["speed"] == {}
    assert not list((sabotaged / ".work/engines").rglob("model.half"))
    verdict = json.loads((sabotaged / "reports/miniature/verdict.json").read_text())
    entry = verdict["scenarios"]["qa"]
    assert entry["reference"] in WELL
    assert entry["champion"] in WELL
    for fault, reason in REASONS.items():
        assert reason in entry["rejected"][f"faulty-{fault}"]
