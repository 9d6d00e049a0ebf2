from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.errors import UserError
from hasten.training import placement
from hasten.training.options import PLACEMENT, Precision, Strategy, Training
from hasten.training.placement import matmul_rate, place
from tests.tiny import training


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "cpu_count", lambda: 8)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def cuda(monkeypatch: pytest.MonkeyPatch, devices: int, bfloat16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)


@pytest.mark.parametrize(
    ("changes", "data", "tensor"),
    [
        ({}, 1, 1),
        ({"strategy": Strategy.ddp, "processes": 4}, 4, 1),
        ({"strategy": Strategy.fsdp, "processes": 4}, 4, 1),
        ({"strategy": Strategy.tensor_parallel, "processes": 4}, 1, 4),
        ({"strategy": Strategy.hybrid, "processes": 4, "tensor_parallel": 2}, 2, 2),
        ({"strategy": Strategy.ddp, "processes": 4, "nodes": 2}, 4, 1),
    ],
)
def test_processes_form_a_grid(changes: dict[str, Any], data: int, tensor: int) -> None:
    placed = place(training(**changes))
    assert (placed.data, placed.tensor, placed.processes) == (data, tensor, data * tensor)
    assert placed.trainer_options()["devices"] == placed.processes // changes.get("nodes", 1)


def test_those_that_share_a_matrix_see_the_same_sequences() -> None:
    placed = place(training(strategy=Strategy.hybrid, processes=4, tensor_parallel=2))
    shares = [placed.share(rank, accumulate=1) for rank in range(4)]
    assert [share.rank for share in shares] == [0, 0, 1, 1]
    assert {share.ranks for share in shares} == {2}


def test_every_cuda_device_is_taken_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 4)
    placed = place(training(accelerator="auto", strategy=Strategy.fsdp, nodes=2, batch_size=16))
    assert (placed.accelerator, placed.processes) == ("cuda", 8)
    assert placed.trainer_options()["num_nodes"] == 2


def test_torchrun_says_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place(training(strategy=Strategy.ddp)).processes == 2


def test_processes_share_the_cores() -> None:
    assert place(training(strategy=Strategy.ddp, processes=4, threads=0)).threads == 2
    assert place(training(strategy=Strategy.ddp, processes=4, threads=3)).threads == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"processes": 2}, r"training.strategy must be ddp, .* for 2 processes, got single"),
        ({"nodes": 2}, r"training.strategy must be ddp, .* for 2 processes, got single"),
        ({"accumulate": 3}, r"batch_size must be a multiple of training.accumulate \(3\) times .* \(1\), got 4"),
        ({"strategy": Strategy.ddp}, r"training.processes must say how many .* strategy ddp on the CPU, got 0"),
        (
            {"strategy": Strategy.ddp, "processes": 3},
            r"batch_size must be a multiple of training.accumulate \(1\) times .* \(3\), got 4",
        ),
        (
            {"strategy": Strategy.ddp, "processes": 2, "accumulate": 4},
            r"batch_size must be a multiple of training.accumulate \(4\) times .* \(2\), got 4",
        ),
        ({"strategy": Strategy.ddp, "processes": 16, "batch_size": 16}, r"at most 8: a node has 8 cores, got 16"),
        ({"strategy": Strategy.fsdp, "processes": 3, "nodes": 2}, r"divisible by training.nodes \(2\), got 3"),
        ({"strategy": Strategy.hybrid, "processes": 4}, r"at least 2 and divide the 4 processes .* got 0"),
        ({"strategy": Strategy.hybrid, "processes": 4, "tensor_parallel": 3}, r"divide the 4 processes .* got 3"),
        ({"strategy": Strategy.ddp, "processes": 4, "tensor_parallel": 2}, r"must be 0 with strategy ddp, got 2"),
        (
            {"strategy": Strategy.tensor_parallel, "processes": 4, "tensor_parallel": 2},
            r"must be 0 or all 4 processes .* got 2",
        ),
        ({"accelerator": "cuda"}, r"training.accelerator must be cpu or auto where torch finds no CUDA device"),
    ],
)
def test_what_does_not_go_together_is_refused_with_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        place(training(**changes))


def test_absent_devices_and_precisions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 2, bfloat16=False)
    with pytest.raises(UserError, match="at most 2: a node has 2 CUDA devices, got 4"):
        place(training(accelerator="cuda", strategy=Strategy.ddp, processes=4))
    with pytest.raises(UserError, match=r"training.precision must be float32 or auto .* got bfloat16"):
        place(training(accelerator="cuda", precision=Precision.bfloat16))


def test_automatic_precision_follows_what_the_hardware_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    for computed, name in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(placement, "computes_bfloat16", lambda accelerator, computed=computed: computed)
        placed = place(training(precision=Precision.auto))
        assert placed.low is computed
        assert placed.trainer_options()["precision"] == name


def test_every_option_of_placement_is_one() -> None:
    assert set(PLACEMENT) <= set(Training.__dataclass_fields__)


def test_the_rate_of_all_devices_together() -> None:
    found = {"matmul_flops_per_second": {"float32": 1e9, "bfloat16": None}}
    assert matmul_rate(found, place(training(strategy=Strategy.ddp, processes=2))) == 1e9  # measured on all cores
    assert matmul_rate(found, place(training(precision=Precision.bfloat16))) is None
    assert matmul_rate(None, place(training())) is None
