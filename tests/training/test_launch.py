from __future__ import annotations

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.artifacts import read_json
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.imported import Huggingface
from hasten.training.launch import PLACED, REQUEUES, Kind, Launch, check, merged, read, seconds, text
from hasten.training.options import Strategy
from tests import tiny

ROOT = Path(__file__).parents[2]
PLACEMENT = ["training.accelerator=cuda", "training.nodes=2", "training.processes=16", "training.threads=4"]
NOTING = 'printf "%s\\0" "$@" > "$SEEN/srun"; echo "$MASTER_ADDR $MASTER_PORT" > "$SEEN/master"; exit "$SRUN_ENDS"'
TWO_TASKS = """
while [[ "$1" == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NAME=hasten-pretrain
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
echo "${tasks[@]}" > "$SEEN/tasks"
for task in "${tasks[@]}"; do wait "$task"; code=$?; (( code > worst )) && worst=$code; done
exit "${worst:-0}"
"""
"""As `srun` does on one node: a process for each task, and the worst of their exit codes."""
SHOW = 'echo "$@" >> "$SEEN/scontrol"; if [ "$1" = show ]; then printf "%s\\nnode4\\n" "$FIRST"; fi'


def launch(**changes: Any) -> Launch:
    """2 nodes of 8 processes."""
    return Launch(**{"nodes": 2, "processes": 8, "host": "node0", **changes})


def start(job: Launch, folder: Path, srun: str = NOTING, **environment: str) -> subprocess.Popen[str]:
    """A batch file, where `srun` and `scontrol` are stand-ins that note what they were asked."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in {"srun": srun, "scontrol": SHOW}.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[3-4]", "SRUN_ENDS": "0", "FIRST": "node3"}
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SEEN": str(folder), **slurm, **environment}
    return subprocess.Popen(["bash", "-c", text(job)], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def played(job: Launch, folder: Path, **environment: str) -> int:
    """Its exit code."""
    process = start(job, folder, **environment)
    process.communicate(timeout=60)
    return process.returncode


def asked(folder: Path) -> list[str]:
    """What `srun` was given."""
    return (folder / "srun").read_text().split("\0")[:-1]


def test_arguments_are_told_apart_from_the_stages_own() -> None:
    overrides = ("model=small", "training.steps=5", "+training.mixture.en=2")
    found = read(["kind=slurm", overrides[0], "nodes=2", overrides[1], "time=1-00:00:00", overrides[2]])
    assert found == Launch(Kind.slurm, nodes=2, time="1-00:00:00", overrides=overrides)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("kind=pbs", "kind must be one of ['torchrun', 'slurm'], got 'pbs'"),
        ("stage=prepare", "stage must be one of ['pretrain', 'finetune'], got 'prepare'"),
        ("nodes=two", "nodes must be a whole number, got 'two'"),
        ("nodes=-1", "nodes must be a whole number, got '-1'"),
        ("nodes=0", "nodes must be 1 to 65536, got 0"),
        ("processes=2000", "processes must be 1 to 1024, got 2000"),
        ("cpus=0", "cpus must be 1 to 4096, got 0"),
        ("port=80", "port must be 1024 to 65535, got 80"),
        ("device=tpu", "device must be one of ['cuda', 'cpu'], got 'tpu'"),
        ("time=90", "time must be hours:minutes:seconds or days-hours:minutes:seconds, got '90'"),
        ("time=1:60:00", "time must be hours:minutes:seconds or days-hours:minutes:seconds, got '1:60:00'"),
        ("time=00:04:00", "time must be longer than grace and the 60 s that Slurm may be early, got 00:04:00 with"),
        ("partition=a b", "partition must be letters, digits, '.', ',', '-' and '_', got 'a b'"),
        ("account=x\n#SBATCH --wait", "account must be letters, digits, '.', ',', '-' and '_', got"),
        ("host=-flag", "host must be letters"),
        ("training.nodes=3", "training.nodes follows from nodes, processes, device and cpus; leave it out, got"),
        ("+training.accelerator=cpu", "training.accelerator follows from"),
        ("--multirun", "arguments are key=value, such as kind=slurm or training.steps=500, got '--multirun'"),
        ("nodes", "arguments are key=value"),
        ("=5", "arguments are key=value"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_in_one_sentence(argument: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        read(["kind=slurm", argument])


def test_several_nodes_under_torchrun_need_a_place_to_meet() -> None:
    with pytest.raises(UserError, match=re.escape("host must name the node where all of them meet")):
        read(["nodes=2"])
    assert read(["nodes=2", "host=node0"]).host == "node0"


def test_what_is_said_later_about_a_key_takes_its_place() -> None:
    plan = ["plan=p", "model=tiny", "training.steps=5", "training.batch_size=8"]
    mine = ["training.steps=9", "model=small", "+training.mixture.en=2"]
    assert merged(plan, mine) == ("plan=p", "training.batch_size=8", *mine)


@given(st.integers(0, 999), st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_a_time_is_read_as_slurm_writes_it(days: int, hours: int, minutes: int, rest: int) -> None:
    assert seconds(f"{days}-{hours:02}:{minutes:02}:{rest:02}") == 86400 * days + 3600 * hours + 60 * minutes + rest
    assert seconds(f"{hours}:{minutes:02}:{rest:02}") == 3600 * hours + 60 * minutes + rest


def test_every_option_of_the_placement_is_one_of_the_training() -> None:
    options = tiny.training()
    assert all(hasattr(options, name) for name in PLACED)


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_reads_the_command_as_it_is_meant(nodes: int) -> None:
    from torch.distributed.run import config_from_args, parse_args

    job = launch(nodes=nodes, port=30000, overrides=("model=small", "training.strategy=ddp"))
    grace, program, *arguments = shlex.split(text(job), comments=True)
    assert (grace, program) == ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=180", "torchrun")
    parsed = parse_args(arguments)
    config, *_ = config_from_args(parsed)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (nodes, nodes, 8)
    assert config.max_restarts == 0  # an option that is wrong would be wrong again
    assert (ROOT / parsed.training_script).is_file()
    placed = [PLACEMENT[0], f"training.nodes={nodes}", f"training.processes={8 * nodes}", PLACEMENT[3]]
    assert parsed.training_script_args == ["model=small", "training.strategy=ddp", *placed]
    assert parsed.standalone == (nodes == 1)
    if nodes > 1:
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "node0:30000")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20), max_size=3))
def test_no_value_is_read_by_the_shell(values: list[str]) -> None:
    overrides = tuple(f"training.note={value}" for value in values)
    words = shlex.split(text(launch(overrides=overrides)), comments=True)
    assert words[words.index("pipelines/pretrain.py") + 1 :] == [*overrides, *PLACEMENT]


def test_srun_starts_the_stage_once_for_each_process(tmp_path: Path) -> None:
    overrides = ("model=small", "training.mixture={en: 2, zh: 1}", "note=$(touch pwned) `touch pwned` 'x' \"y\" # z")
    assert played(launch(kind=Kind.slurm, overrides=overrides), tmp_path) == 0
    flags, fit = asked(tmp_path)[:3], asked(tmp_path)[3:]
    assert flags == ["--kill-on-bad-exit=0", "--wait=180", "--cpus-per-task=4"]
    assert fit == ["python", "pipelines/pretrain.py", *overrides, *PLACEMENT]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("job_id", [1, 19999, 20000, 123456789])
def test_processes_meet_on_the_first_node_at_a_port_of_their_own(tmp_path: Path, job_id: int) -> None:
    played(launch(kind=Kind.slurm), tmp_path, SLURM_JOB_ID=str(job_id))
    assert (tmp_path / "scontrol").read_text() == "show hostnames node[3-4]\n"
    host, port = (tmp_path / "master").read_text().split()
    assert (host, int(port)) == ("node3", 10000 + job_id % 20000)  # below the ports that systems give away


@pytest.mark.parametrize(("ends", "again"), [(143, True), (0, False), (2, False), (1, False), (137, False)])
def test_only_a_fit_that_was_told_to_end_goes_back_into_the_queue(tmp_path: Path, ends: int, again: bool) -> None:
    assert played(launch(kind=Kind.slurm), tmp_path, SRUN_ENDS=str(ends)) == ends
    assert ("requeue 123456" in (tmp_path / "scontrol").read_text().splitlines()) is again


def test_a_job_that_never_begins_does_not_queue_for_ever(tmp_path: Path) -> None:
    played(launch(kind=Kind.slurm), tmp_path, SRUN_ENDS="143", SLURM_RESTART_COUNT=str(REQUEUES))
    assert "requeue" not in (tmp_path / "scontrol").read_text()
    played(launch(kind=Kind.slurm), tmp_path, SRUN_ENDS="143", SLURM_RESTART_COUNT=str(REQUEUES - 1))
    assert "requeue" in (tmp_path / "scontrol").read_text()


def directives(job: Launch) -> dict[str, str]:
    """What sbatch reads: it stops at the first command, and takes no comment behind a value."""
    head = text(job).split("\nexport", 1)[0].splitlines()
    assert head[0] == "#!/bin/bash"
    assert all(not line or line.startswith("#") for line in head)
    assert "#SBATCH" not in text(job).split("\nexport", 1)[1]
    found = [line.removeprefix("#SBATCH --").partition("=") for line in head if line.startswith("#SBATCH")]
    return {name: value for name, _, value in found}


def test_a_batch_file_asks_for_a_task_and_a_gpu_per_process_and_for_time_to_save() -> None:
    job = launch(kind=Kind.slurm, time="1-12:00:00", grace=90, partition="gpu", account="lab_1", memory_gib=200)
    assert directives(job) == {
        "job-name": "hasten-pretrain",  # `bash` or `interactive` would hide Slurm from Lightning
        "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "4", "mem": "200G",
        "partition": "gpu", "account": "lab_1", "time": "1-12:00:00", "signal": "TERM@90", "requeue": "",
        "open-mode": "append",
    }  # fmt: skip


def test_processes_without_gpus_ask_for_none() -> None:
    job = launch(kind=Kind.slurm, device="cpu")
    assert {"gpus-per-node", "mem", "partition", "account"} & directives(job).keys() == set()
    assert "training.accelerator=cpu" in job.arguments


@pytest.mark.parametrize(
    ("options", "shape", "sentence"),
    [
        ({}, None, "training.strategy must be ddp, fsdp, tensor_parallel or hybrid for 16 processes, got single"),
        (
            {"strategy": Strategy.ddp, "batch_size": 24},
            None,
            "the processes that share a batch (16), got 24",
        ),
        (
            {"strategy": Strategy.hybrid, "tensor_parallel": 4, "batch_size": 12, "accumulate": 2},
            None,
            "training.accumulate (2) times the processes that share a batch (4), got 12",
        ),
        ({"strategy": Strategy.hybrid, "tensor_parallel": 3}, None, "training.tensor_parallel must be at least 2"),
        (
            {"strategy": Strategy.hybrid, "tensor_parallel": 4, "batch_size": 8},
            tiny.shape(),
            "training.tensor_parallel must divide model.kv_heads (2), got 4",
        ),
        ({"strategy": Strategy.tensor_parallel}, tiny.lstm_shape(), "for an LSTM"),
        ({}, Huggingface(), "model must be a shape that is trained: an import needs one process"),
    ],
)  # fmt: skip
def test_what_the_cluster_would_refuse_is_refused_here(options: dict[str, Any], shape: object, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        check(launch(), tiny.training(**options), shape)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"strategy": Strategy.ddp, "batch_size": 32, "accumulate": 2}, tiny.shape()),
        ({"strategy": Strategy.fsdp, "batch_size": 16}, tiny.lstm_shape()),
        ({"strategy": Strategy.hybrid, "tensor_parallel": 2, "batch_size": 8}, ModelConfig(heads=4, kv_heads=2)),
        ({"strategy": Strategy.tensor_parallel, "batch_size": 1}, None),
    ],
)
def test_what_fits_is_let_through_although_this_machine_has_no_such_devices(
    options: dict[str, Any], shape: object
) -> None:
    check(launch(), tiny.training(**options), shape)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point, in this process: torch is loaded already."""
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "pipelines/launch.py"))["main"](arguments)


def test_the_entry_point_prints_the_plans_own_choices_and_what_takes_their_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=tiny", "training.strategy=ddp", "training.batch_size=16", "training.steps=7"]
    run(["kind=slurm", "stage=pretrain", "nodes=2", "processes=8", *given], monkeypatch)
    written, said = capsys.readouterr()
    assert said == ""
    words = shlex.split(next(line for line in written.splitlines() if "pipelines/pretrain.py" in line))
    assert [word for word in words if word.startswith("plan=")]
    assert [word for word in words if word.startswith(("model=", "training.steps="))] == ["model=tiny", given[-1]]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("tiem=1:00:00", "tiem"),
        ("training.batch_size=0", "training.batch_size must be at least 1, got 0"),
        ("seed=1", "training.strategy must be ddp, fsdp, tensor_parallel or hybrid for 2 processes, got single"),
        ("model=huggingface", "model must be a shape that is trained"),
    ],
)
def test_the_entry_point_refuses_in_one_sentence_and_prints_no_file(
    argument: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["kind=slurm", "processes=2", "model=tiny", argument], monkeypatch)
    written, said = capsys.readouterr()
    assert (ended.value.code, written) == (2, "")
    assert said.startswith("launch: ")
    assert sentence in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_fit_that_ran_out_of_time_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    """Two processes that Slurm's variables tell who they are; one of them is told to end."""
    for name in ("conf", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    tiny.write_tokens(tmp_path / "artifacts/p/tokens")
    tiny.write_tokenizer(tmp_path / "artifacts/p/tokenizer")
    tiny.write_ceilings(tmp_path, threads=2)
    steps = 600
    fit = (
        *("plan=p", "model=tiny", "model.layers=1", "model.hidden_size=16", "model.heads=2", "model.kv_heads=1"),
        *("model.feed_forward_size=16", "training.strategy=ddp", "training.batch_size=4"),
        *(f"training.steps={steps}", f"training.validate_every_steps={steps}", "training.checkpoint_every_steps=10"),
        *("training.log_every_steps=1", "training.precision=float32", "training.sequence_length=16"),
    )
    job = launch(kind=Kind.slurm, nodes=1, processes=2, device="cpu", cpus=1, overrides=fit)
    environment = {"FIRST": "127.0.0.1", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    first = start(job, tmp_path, TWO_TASKS, **environment)
    while not list(tmp_path.glob(".work/fits/*/step-*.ckpt")):
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(int((tmp_path / "tasks").read_text().split()[1]), signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 143, said
    assert "requeue 123456" in (tmp_path / "scontrol").read_text()
    [saved] = tmp_path.glob(".work/fits/*/step-*.ckpt")
    again = start(job, tmp_path, TWO_TASKS, SLURM_RESTART_COUNT="1", **environment)
    _, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    resumed, *_ = (int(step) for step in re.findall(r"step (\d+)/", said))
    assert resumed > int(saved.stem.removeprefix("step-")) >= 10
    assert (tmp_path / "scontrol").read_text().count("requeue") == 1
    record = read_json(tmp_path / "artifacts/p/runs/pretrain.json")
    assert [step for step, _ in record["curves"]["train_loss"]] == list(range(1, steps + 1))
