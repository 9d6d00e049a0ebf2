"""Two processes over gloo train what one trains. They are started once for all cases: importing takes longest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hasten.artifacts import read_json
from hasten.errors import UserError
from hasten.training.checkpoints import found
from hasten.training.options import Optimiser, Strategy
from tests.tiny import Curves, decoder, lstm, shape, write_tokens
from tests.training.fits import StoppedError, fitted

ROOT = Path(__file__).parents[2]
QWEN = {"head_norm": True, "qkv_bias": True, "output_bias": True}
HALF_WAY = {"validate_every_steps": 9, "stop_at": 9}
TWO: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp", "processes": 2},
    "ddp-accumulated": {"strategy": "ddp", "processes": 2, "accumulate": 2, "dropout": 0.0},
    "ddp-muon": {"strategy": "ddp", "processes": 2, "optimiser": "muon"},
    "fsdp": {"strategy": "fsdp", "processes": 2},
    "fsdp-muon": {"strategy": "fsdp", "processes": 2, "optimiser": "muon"},
    "fsdp-recomputing": {"strategy": "fsdp", "processes": 2, "activation_checkpointing": True},
    "tensor_parallel": {"strategy": "tensor_parallel", "processes": 2},
    "tensor_parallel-head_norm": {
        "strategy": "tensor_parallel",
        "processes": 2,
        "shape": QWEN,
    },
    # written by two, read by one below
    "two": {"strategy": "fsdp", "processes": 2, **HALF_WAY, "scratch": "from-two"},
    # written by one before, read by two
    "from-one": {"strategy": "fsdp", "processes": 2, "scratch": "from-one-scratch"},
    "dropout": {"strategy": "ddp", "processes": 2, "dropout": 0.2},
    "dropout-stopped": {
        "strategy": "ddp", "processes": 2, "dropout": 0.2, **HALF_WAY, "scratch": "dropped",
    },
    "dropout-resumed": {"strategy": "ddp", "processes": 2, "dropout": 0.2, "scratch": "dropped"},
    "muon-stopped": {
        "strategy": "fsdp", "processes": 2, "optimiser": "muon", **HALF_WAY, "scratch": "muon",
    },
    "muon-resumed": {"strategy": "fsdp", "processes": 2, "optimiser": "muon", "scratch": "muon"},
    "split-stopped": {
        "strategy": "tensor_parallel", "processes": 2, "shape": QWEN,
        **HALF_WAY, "scratch": "split",
    },
    "split-resumed": {
        "strategy": "fsdp", "processes": 2, "shape": QWEN, "scratch": "split",
    },
    "lora": {"strategy": "ddp", "processes": 2, "lora": True},
    "lora-fsdp": {"strategy": "fsdp", "processes": 2, "lora": True},
    "lstm": {"strategy": "ddp", "processes": 2, "recurrent": True, "documents_apart": False},
    "lstm-fsdp": {"strategy": "fsdp", "processes": 2, "recurrent": True, "documents_apart": False},
    "terminated": {"strategy": "ddp", "processes": 2, "terminate_at": 6, "dropout": 0.2, "scratch": "terminated"},
    "terminated-resumed": {"strategy": "ddp", "processes": 2, "dropout": 0.2, "scratch": "terminated"},
    "patient": {"strategy": "fsdp", "processes": 2, "patience": 2, "scores": [1, 2, 1, 1], "validate_every_steps": 3},
}  # fmt: skip
SINGLE = {"optimiser": Optimiser.adamw}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes made of every case."""
    folder = tmp_path_factory.mktemp("two")
    write_tokens(folder / "tokens")
    with pytest.raises(StoppedError):
        alone(folder, "from-one-scratch", strategy=Strategy.fsdp, processes=1, **HALF_WAY)
    run(folder, TWO, processes=2)
    return folder


def run(folder: Path, cases: dict[str, dict[str, Any]], processes: int) -> None:
    """All cases, one after the other, in so many processes."""
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/training/fits.py")
    done = subprocess.run(
        [*command, script, str(listed), str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def alone(folder: Path, scratch: str, **changes: Any) -> tuple[dict[str, Tensor], Curves]:
    curves = Curves()
    model = changes.pop("model", None)
    network, _ = fitted(folder / "tokens", folder / scratch, metrics=curves, model=model, **{**SINGLE, **changes})
    return {name: value.clone() for name, value in network.state_dict().items()}, curves


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], atol=tolerance, rtol=0) for name in one)


@pytest.mark.parametrize(
    "case", ["ddp", "ddp-accumulated", "fsdp", "fsdp-recomputing", "tensor_parallel", "tensor_parallel-head_norm"]
)
def test_two_processes_have_the_loss_curve_and_the_weights_of_one(two: Path, case: str) -> None:
    """To 1e-4 in float32: sums are in another order, and Adam divides by small numbers."""
    changes = {"model": decoder(shape(**TWO[case].get("shape", {})), spread=0.02)}
    weights, curves = alone(two, f"{case}-alone", **changes)
    facts = read_json(two / f"{case}.json")
    assert facts["tokens"] == 12 * 4 * 16
    assert facts["loss"] == pytest.approx({str(k): v for k, v in curves.curve("train_loss").items()}, abs=1e-4)
    assert close(load_file(two / f"{case}.safetensors"), weights, 1e-4)


@pytest.mark.parametrize("case", ["ddp-muon", "fsdp-muon"])
def test_muon_orthogonalises_whole_matrices_also_where_they_are_spread(two: Path, case: str) -> None:
    """It computes in bfloat16, hence the tolerance: a step of a single sign flip would be 0.01."""
    weights, curves = alone(two, f"{case}-alone", optimiser=Optimiser.muon)
    facts = read_json(two / f"{case}.json")
    assert facts["loss"] == pytest.approx({str(k): v for k, v in curves.curve("train_loss").items()}, abs=2e-2)
    assert close(load_file(two / f"{case}.safetensors"), weights, 2e-2)


def test_what_two_processes_saved_one_goes_on_with(two: Path) -> None:
    assert [step for step, _ in found(two / "from-two")] == [8]
    weights, curves = alone(two, "from-two", strategy=Strategy.fsdp, processes=1)
    whole, _ = alone(two, "whole")
    assert list(curves.curve("train_loss")) == [10, 12]
    assert close(weights, whole, 1e-4)


def test_what_one_process_saved_two_go_on_with(two: Path) -> None:
    assert read_json(two / "from-one.json")["resumed_at_step"] == 8
    whole, _ = alone(two, "whole-again")
    assert close(load_file(two / "from-one.safetensors"), whole, 1e-4)


def test_two_processes_with_dropout_resume_to_the_same_bits_and_draw_differently(two: Path) -> None:
    assert read_json(two / "dropout-resumed.json")["resumed_at_step"] == 8
    whole, resumed = (load_file(two / f"{case}.safetensors") for case in ("dropout", "dropout-resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not close(whole, load_file(two / "ddp.safetensors"), 1e-4)  # dropout did something


@pytest.mark.parametrize(
    ("case", "make"), [("lora", decoder), ("lora-fsdp", decoder), ("lstm", lstm), ("lstm-fsdp", lstm)]
)
def test_adapters_and_recurrent_networks_train_on_two_as_on_one(two: Path, case: str, make: Any) -> None:
    changes = {name: value for name, value in TWO[case].items() if name in ("lora", "documents_apart")}
    start = make(spread=0.02 if make is decoder else 0.3)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    weights, curves = alone(two, f"{case}-alone", model=start, **changes)
    facts = read_json(two / f"{case}.json")
    assert facts["loss"] == pytest.approx({str(k): v for k, v in curves.curve("train_loss").items()}, abs=1e-4)
    assert close(load_file(two / f"{case}.safetensors"), weights, 1e-4)
    assert not close(before, weights, 1e-3)  # there was something to learn


def test_a_signal_to_one_process_saves_and_ends_both_and_they_resume_to_the_same_bits(two: Path) -> None:
    assert [read_json(two / f"terminated-{rank}.json")["code"] for rank in (0, 1)] == [143, 143]
    assert read_json(two / "terminated-resumed.json")["resumed_at_step"] == 6
    whole, resumed = (load_file(two / f"{case}.safetensors") for case in ("dropout", "terminated-resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_four_processes_in_two_pairs_train_as_one(tmp_path: Path) -> None:
    """Each pair shares matrices, the pairs share sequences and everything else."""
    write_tokens(tmp_path / "tokens")
    pairs = {"strategy": "hybrid", "processes": 4, "tensor_parallel": 2}
    run(tmp_path, {"hybrid": pairs, "qwen": {**pairs, "shape": QWEN}}, processes=4)
    for case, changed in (("hybrid", {}), ("qwen", QWEN)):
        weights, curves = alone(tmp_path, f"{case}-alone", model=decoder(shape(**changed), spread=0.02))
        facts = read_json(tmp_path / f"{case}.json")
        assert facts["loss"] == pytest.approx({str(k): v for k, v in curves.curve("train_loss").items()}, abs=1e-4)
        assert close(load_file(tmp_path / f"{case}.safetensors"), weights, 1e-4)


def test_both_optimisers_resume_from_shards(two: Path) -> None:
    assert read_json(two / "muon-resumed.json")["resumed_at_step"] == 8
    whole, resumed = (load_file(two / f"{case}.safetensors") for case in ("fsdp-muon", "muon-resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_shared_matrices_saved_shared_weights_go_on_with(two: Path) -> None:
    assert read_json(two / "split-resumed.json")["resumed_at_step"] == 8
    split, resumed = (load_file(two / f"{case}.safetensors") for case in ("tensor_parallel-head_norm", "split-resumed"))
    assert close(split, resumed, 1e-4)


def test_the_best_weights_are_gathered_and_exported(two: Path) -> None:
    facts = read_json(two / "patient.json")
    assert (facts["steps"], facts["validation"]) == (12, {"accuracy_probe": 2})
    whole, _ = alone(two, "six", steps=12, patience=2, scores=[1, 2, 1, 1], validate_every_steps=3)
    assert close(load_file(two / "patient.safetensors"), whole, 1e-4)
    last, _ = alone(two, "twelve")
    assert not close(whole, last, 1e-4)


def test_a_sharded_checkpoint_is_refused_where_weights_are_whole(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "step-8.ckpt").mkdir(parents=True)
    write_tokens(tmp_path / "tokens")
    with pytest.raises(
        UserError, match=r"training.strategy must be fsdp, tensor_parallel or hybrid to go on from step 8"
    ):
        alone(tmp_path, "scratch")
