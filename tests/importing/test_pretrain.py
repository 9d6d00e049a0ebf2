"""The stages as a user calls them: `prepare` imports the tokenizer, `pretrain` the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.artifacts import Checkpoint, read_json
from hasten.model.huggingface import load_network
from hasten.tokenizer.base import TrainingText
from hasten.tokenizer.imported import Imported
from tests.importing.arrivals import write_source

ROOT = Path(__file__).parents[2]


def pretrain(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipelines/pretrain.py"), "plan=p", "model=huggingface", *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with a checkpoint and with what `prepare` leaves of its tokenizer."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    source = write_source(tmp_path / "source", shards=2)
    tokenizer = tmp_path / "artifacts/p/tokenizer"
    tokenizer.mkdir(parents=True)
    Imported(path=str(source)).build(TrainingText({}, lambda: iter(())), tokenizer)
    return tmp_path


def test_pretrain_imports_what_the_plan_names_and_records_it(study: Path) -> None:
    done = pretrain(study, "model.path=source", "model.verify_tokens=8")
    assert done.returncode == 0, done.stderr
    base = Checkpoint(study / "artifacts/p/checkpoints/base")
    assert load_network(base).config.layers == 2
    record = read_json(study / "artifacts/p/runs/pretrain.json")
    assert record["metrics"]["imported_logit_difference"] < 1e-4


def test_a_checkpoint_that_is_refused_is_one_sentence_and_exit_code_2(study: Path) -> None:
    (study / "source/model-00002-of-00002.safetensors").unlink()
    done = pretrain(study, "model.path=source")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(
        "pretrain: source: model.safetensors.index.json names model-00002-of-00002.safetensors"
    )
    assert not (study / "artifacts/p/checkpoints").exists()
