"""A stage on two processes, as a user starts it: Lightning runs the entry point again for the second one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hasten.artifacts import read_json
from hasten.training.checkpoints import found
from tests.tiny import write_ceilings, write_tokenizer, write_tokens

ROOT = Path(__file__).parents[2]
FIT = [
    *("training.steps=24", "training.batch_size=4", "training.sequence_length=16", "training.threads=1"),
    *("training.log_every_steps=1", "training.precision=float32", "training.optimiser=adamw", "training.dropout=0.1"),
    *(
        "training.checkpoint_every_steps=3",
        "training.validate_every_steps=12",
        "model.layers=1",
        "model.hidden_size=16",
    ),
    *("model.heads=2", "model.kv_heads=1", "model.feed_forward_size=16"),
]
TWO = ("training.strategy=ddp", "training.processes=2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to run stages in, with tokens and a tokenizer."""
    for name in ("conf", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_tokens(tmp_path / "artifacts/p/tokens")
    write_tokenizer(tmp_path / "artifacts/p/tokenizer")
    write_ceilings(tmp_path, threads=2)
    return tmp_path


def start(place: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "pipelines/pretrain.py", "plan=p", *FIT, *more],
        cwd=place,
        env={
            **{name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")},
            "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db",
            "PYTHONPATH": str(ROOT / "src"),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "artifacts/p/checkpoints/base/model.safetensors")


def runs(place: Path) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("hasten").experiment_id])


def test_two_processes_are_one_run_and_one_checkpoint(place: Path) -> None:
    process = start(place, *TWO)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert said.count("step 24/24  validation_loss") == 1  # the first process alone speaks
    [run] = runs(place)
    assert (run.info.run_name, run.info.status) == ("pretrain", "FINISHED")
    assert run.data.metrics["tokens"] == run.data.metrics["trained_tokens"] == 24 * 4 * 16
    record = read_json(place / "artifacts/p/runs/pretrain.json")
    assert [step for step, _ in record["curves"]["train_loss"]] == list(range(1, 25))
    assert "model.embed_tokens.weight" in weights(place)
    assert not list((place / ".work/fits").glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_killed_processes_resume_to_the_same_bits_in_the_same_run(place: Path, seed: int) -> None:
    moments, more = random.Random(seed), (*TWO, "training.steps=300")
    whole = start(place, *more)
    assert whole.wait(240) == 0, whole.stderr.read() if whole.stderr else ""
    expected = weights(place)
    for name in ("checkpoints", "runs"):
        for path in sorted((place / "artifacts/p" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    for _ in range(2):
        kill_after_a_new_checkpoint(start(place, *more), place, moments.uniform(0, 0.5))
    last = start(place, *more)
    _, said = last.communicate(timeout=240)
    assert last.returncode == 0, said
    assert all(torch.equal(value, expected[name]) for name, value in weights(place).items())
    [run] = runs(place)
    assert "It went on from step " in run.data.tags["mlflow.note.content"]
    record = read_json(place / "artifacts/p/runs/pretrain.json")
    assert [step for step, _ in record["curves"]["train_loss"]] == list(range(1, 301))


def kill_after_a_new_checkpoint(process: subprocess.Popen[str], place: Path, seconds: float) -> None:
    """SIGKILL to the first process some time after it has saved a step of its own; the other one ends by itself."""
    deadline, before = time.monotonic() + 240, latest_step(place)
    while latest_step(place) <= before:
        assert time.monotonic() < deadline
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert latest_step(place) < 300


def latest_step(place: Path) -> int:
    """Of the running checkpoints; 0 without one."""
    return max((step for folder in (place / ".work/fits").glob("*") for step, _ in found(folder)), default=0)
