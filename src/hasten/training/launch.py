"""How a fit is started on many processes: a torchrun command line, or a batch file for Slurm, as text.

One machine needs none of this: with `training.strategy` set, a fit starts its own processes. Several machines need
somebody who starts one process per device on each of them, tells them their ranks and where to meet: torchrun, by hand
on every node, or Slurm. Nothing is started here; what is printed can be read, kept and changed.

A cluster takes machines away, and what a fit has learnt by then must not be lost. So the batch file asks for SIGTERM
before its time is up: the fit saves after the step at hand and ends with 143, the job goes back into the queue, and its
next turn goes on from there. Any other end is final: an option that is wrong would be wrong again.

    python pipelines/launch.py kind=slurm stage=pretrain nodes=2 processes=8 training.strategy=fsdp > fit.sbatch
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    from hasten.training.options import Training

PLACED = ("accelerator", "nodes", "processes", "threads")
"""Options of `training` that follow from where the fit is started."""
REQUEUES = 100
"""How often a job goes back into the queue at most: one that is told to end before it began would do so for ever."""
EARLIEST_SECONDS = 60
"""How much earlier than it was asked to Slurm may send its signal (sbatch(1), --signal)."""
DURATION = re.compile(r"(?:(\d{1,3})-)?(\d{1,2}):(\d{2}):(\d{2})")


class Kind(Enum):
    """Who starts the processes."""

    torchrun = "torchrun"
    slurm = "slurm"


@dataclass(frozen=True)
class Launch:
    """A fit and where it is to run. `overrides` are the stage's, as on its own command line.

    kind: torchrun or slurm. stage: pretrain or finetune. nodes: machines. processes: on each of them. device: cuda, one
    for each process, or cpu. cpus: cores of each process. memory_gib: of a node (slurm; 0: what the cluster gives).
    time: hours:minutes:seconds or days-hours:minutes:seconds until a job has to end (slurm). grace: seconds for saving.
    partition, account: where to queue and who pays (slurm). host, port: where nodes meet (torchrun on several nodes).
    """

    kind: Kind = Kind.torchrun
    stage: str = "pretrain"
    nodes: int = 1
    processes: int = 1
    device: str = "cuda"
    cpus: int = 4
    memory_gib: int = 0
    time: str = "24:00:00"
    grace: int = 180
    partition: str = ""
    account: str = ""
    host: str = ""
    port: int = 29500
    overrides: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.stage not in ("pretrain", "finetune"):
            raise one_of("stage", self.stage, ["pretrain", "finetune"])
        if self.device not in ("cuda", "cpu"):
            raise one_of("device", self.device, ["cuda", "cpu"])
        bounds = {"nodes": (1, 65536), "processes": (1, 1024), "cpus": (1, 4096), "memory_gib": (0, 2**20)}
        for name, (low, high) in {**bounds, "grace": (1, 86400), "port": (1024, 65535)}.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be {low} to {high}, got {getattr(self, name)}")
        for name in ("partition", "account", "host"):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,-]*|", getattr(self, name)):
                raise UserError(f"{name} must be letters, digits, '.', ',', '-' and '_', got {getattr(self, name)!r}")
        if self.kind is Kind.slurm and seconds(self.time) <= self.grace + EARLIEST_SECONDS:
            raise UserError(
                f"time must be longer than grace and the {EARLIEST_SECONDS} s that Slurm may be early, got {self.time} "
                f"with grace={self.grace}"
            )
        if self.kind is Kind.torchrun and self.nodes > 1 and not self.host:
            raise UserError("host must name the node where all of them meet, such as host=node0, got ''")
        own = {f"training.{name}" for name in PLACED}
        for override in self.overrides:
            if key_of(override) in own:
                raise UserError(
                    f"{key_of(override)} follows from nodes, processes, device and cpus; leave it out, got {override!r}"
                )

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes

    @property
    def arguments(self) -> list[str]:
        """What the stage's own command line gets."""
        values = (self.device, self.nodes, self.world, self.cpus)
        return [*self.overrides, *(f"training.{name}={value}" for name, value in zip(PLACED, values, strict=True))]


def read(arguments: Sequence[str]) -> Launch:
    """A launch from key=value arguments: those that are no options of its own are the stage's overrides.

    Raises `UserError` for values that cannot be.
    """
    names = [one.name for one in fields(Launch) if one.name != "overrides"]
    values: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not re.match(r"[A-Za-z+~]", argument):
            raise UserError(f"arguments are key=value, such as kind=slurm or training.steps=500, got {argument!r}")
        if name not in names:
            overrides.append(argument)
        elif name == "kind":
            if value not in Kind.__members__:
                raise one_of("kind", value, list(Kind.__members__))
            values[name] = Kind[value]
        elif isinstance(getattr(Launch, name), int):
            if not re.fullmatch(r"[0-9]{1,9}", value):
                raise UserError(f"{name} must be a whole number, got {value!r}")
            values[name] = int(value)
        else:
            values[name] = value
    return Launch(**values, overrides=tuple(overrides))


def merged(first: Iterable[str], then: Iterable[str]) -> tuple[str, ...]:
    """Overrides in order; what comes `then` takes the place of what was said `first` about the same key."""
    later = tuple(then)
    keys = {key_of(override) for override in later}
    return (*(override for override in first if key_of(override) not in keys), *later)


def key_of(override: str) -> str:
    """`+training.steps=5` -> `training.steps`."""
    return override.lstrip("+~").partition("=")[0]


def check(launch: Launch, training: Training, shape: object) -> None:
    """Refuse now what would be refused on the cluster, hours later. Devices are not looked at: they are elsewhere.

    training: the stage's options with those of the launch in them. shape: the model's, or None if it is a checkpoint's.
    Raises `UserError`.
    """
    from hasten.model.recipe import ModelRecipe
    from hasten.model.shape import Shape
    from hasten.training.placement import grid
    from hasten.training.sharding import refuse_unsplittable

    if isinstance(shape, ModelRecipe) and not isinstance(shape, Shape):
        raise UserError("model must be a shape that is trained: an import needs one process, so run the stage itself")
    _, tensor = grid(training, launch.world)
    if shape is not None:
        refuse_unsplittable(shape, tensor)


def text(launch: Launch) -> str:
    """What to run, or to hand to `sbatch`."""
    return batch_file(launch) if launch.kind is Kind.slurm else command_line(launch)


def command_line(launch: Launch) -> str:
    """torchrun, for one node or for each of several (https://docs.pytorch.org/docs/stable/elastic/run.html).

    When it is told to end it tells its processes, and kills them after 30 s unless told otherwise.
    """
    lines = ["# Where .venv is active."]
    where = ["--standalone"]
    if launch.nodes > 1:
        lines = [
            f"# On each of the {launch.nodes} nodes, in this folder, which all of them see, and where .venv is active.",
            f"# {launch.host} is one of them, and the others reach it at port {launch.port}.",
        ]
        meeting = f"--rdzv-endpoint={launch.host}:{launch.port}"
        where = [f"--nnodes={launch.nodes}", "--rdzv-backend=c10d", meeting, f"--rdzv-id=hasten-{launch.stage}"]
    command = ["torchrun", *where, f"--nproc-per-node={launch.processes}", script(launch), *launch.arguments]
    return "\n".join([*lines, f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={launch.grace} {shlex.join(command)}", ""])


def batch_file(launch: Launch) -> str:
    """A file for `sbatch`: one process per device through `srun`, saved before the time is up, queued again.

    `--kill-on-bad-exit=0 --wait`: the first process that ends must not take along one that is still saving.
    """
    optional = {
        "gpus-per-node": launch.processes if launch.device == "cuda" else "",
        "mem": f"{launch.memory_gib}G" if launch.memory_gib else "",
        "partition": launch.partition,
        "account": launch.account,
    }
    fit = shlex.join(["python", script(launch), *launch.arguments])
    return "\n".join(
        [
            "#!/bin/bash",
            "# For sbatch, in this folder, which all nodes see. One process for each device; each of them sees all",
            "# devices of its node and takes its own.",
            f"#SBATCH --job-name=hasten-{launch.stage}",
            f"#SBATCH --nodes={launch.nodes}",
            f"#SBATCH --ntasks-per-node={launch.processes}",
            f"#SBATCH --cpus-per-task={launch.cpus}",
            *(f"#SBATCH --{name}={value}" for name, value in optional.items() if value),
            f"#SBATCH --time={launch.time}",
            f"# {launch.grace} s before the time is up the fit is told to save and to end; the job is queued again.",
            f"#SBATCH --signal=TERM@{launch.grace}",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
            'export PATH="$PWD/.venv/bin:$PATH"',
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
            "export MASTER_ADDR MASTER_PORT",
            "",
            "# Whoever ends first leaves the others time to save; 143 means that the fit was told to end, and saved.",
            f"srun --kill-on-bad-exit=0 --wait={launch.grace} --cpus-per-task={launch.cpus} \\",
            f"    {fit}",
            "code=$?",
            f'if [ "$code" -eq 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {REQUEUES} ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
            "",
        ]
    )


def script(launch: Launch) -> str:
    """The stage's entry point."""
    return f"pipelines/{launch.stage}.py"


def seconds(duration: str) -> int:
    """`1-02:00:00` -> 93600. Raises `UserError` for what is no such duration."""
    found = DURATION.fullmatch(duration)
    if not found or int(found[3]) > 59 or int(found[4]) > 59:
        raise UserError(f"time must be hours:minutes:seconds or days-hours:minutes:seconds, got {duration!r}")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
