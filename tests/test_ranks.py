from __future__ import annotations

import pytest

from hasten.errors import UserError
from hasten.ranks import rank, world_size

VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_JOB_NAME",
)
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "pretrain"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4"}, (3, 4)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        (SLURM, (5, 8)),
        ({**SLURM, "SLURM_PROCID": "0"}, (0, 8)),
        ({**SLURM, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, (2, 16)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, (0, 1)),
        ({**SLURM, "SLURM_JOB_NAME": "interactive", "LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, (1, 2)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, (1, 2)),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),
    ],
    ids=[
        "by hand",
        "torchrun",
        "torchrun of one",
        "srun",
        "srun's first",
        "torchrun within Slurm",
        "Slurm with one task",
        "Slurm's shell",
        "Lightning in Slurm's shell",
        "Lightning's second",
        "Lightning's first, when it has started the others",
    ],
)
def test_whoever_started_the_processes_says_which_one_this_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (rank(), world_size()) == expected


def test_a_process_of_another_node_is_never_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")  # what a user gives Lightning on the second machine, before it starts anything
    assert rank() > 0


@pytest.mark.parametrize("value", ["one", "-1", "1.5"])
def test_a_rank_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RANK", value)
    with pytest.raises(UserError, match=r"the environment's RANK must be a number, got '"):
        rank()


@pytest.mark.parametrize(
    "environment",
    [
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"},
        {"TORCHELASTIC_RUN_ID": "x", **SLURM, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "16"},
        SLURM,
    ],
    ids=["torchrun", "torchrun within Slurm", "srun"],
)
def test_lightning_sees_the_same_processes(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")  # Lightning insists on it; `sbatch --ntasks-per-node` sets it
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = next(kind for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect())()
    assert (asked.global_rank(), asked.world_size()) == (rank(), world_size())
