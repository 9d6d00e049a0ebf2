"""Where a fit runs: which devices, how many processes, and what each of them holds.

Processes form a grid of data x tensor: those in a row (tensor) share every matrix product of the same sequences, those
in a column (data) see different sequences of the same step. The options are checked here, against the machine, before
anything else is done.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hasten.artifacts import Json
from hasten.ceilings import ceilings
from hasten.errors import UserError
from hasten.hardware import cpu_count
from hasten.model.lstm_config import LstmConfig
from hasten.model.shape import Shape
from hasten.ranks import rank, world_size
from hasten.training.data import Share
from hasten.training.options import Precision, Strategy, Training
from hasten.training.sharding import refuse_unsplittable

SHARDED = (Strategy.fsdp, Strategy.tensor_parallel, Strategy.hybrid)
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: as long as a validation or an export may take."""


def computes_bfloat16(accelerator: str) -> bool:
    """Whether bfloat16 is computed in hardware, not emulated."""
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Any = torch.backends.cpu.get_cpu_capability()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "AVX512" in str(capabilities) and "avx512_bf16" in flags


@dataclass(frozen=True)
class Placement:
    """processes = data * tensor, over `nodes` machines. low: matrix products in bfloat16 (autocast)."""

    strategy: Strategy
    accelerator: str
    nodes: int
    data: int
    tensor: int
    threads: int
    low: bool

    @property
    def processes(self) -> int:
        return self.data * self.tensor

    @property
    def sharded(self) -> bool:
        """Whether a process holds parts of weights; then its running checkpoint is a folder, else a file."""
        return self.strategy in SHARDED

    def share(self, rank: int, accumulate: int) -> Share:
        """Which sequences of every step process `rank` sees."""
        return Share(rank // self.tensor, self.data, accumulate)

    def trainer_options(self) -> dict[str, Any]:
        """What Lightning calls it."""
        return {
            "accelerator": self.accelerator,
            "devices": self.processes // self.nodes,
            "num_nodes": self.nodes,
            "strategy": self._strategy(),
            "precision": "bf16-mixed" if self.low else "32-true",
            "use_distributed_sampler": False,  # batches already are a function of the rank
        }

    def _strategy(self) -> Any:
        from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

        backend = "nccl" if self.accelerator == "cuda" else "gloo"
        if self.sharded:
            return ModelParallelStrategy(self.data, self.tensor, process_group_backend=backend, timeout=TIMEOUT)
        if self.strategy is Strategy.ddp:
            return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True, timeout=TIMEOUT)
        return "auto"


def place(options: Training) -> Placement:
    """Where a fit runs. Raises `UserError` for what this machine does not have or what does not go together."""
    accelerator = options.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("training.accelerator must be cpu or auto where torch finds no CUDA device, got 'cuda'")
    if options.precision is Precision.bfloat16 and accelerator == "cuda" and not computes_bfloat16("cuda"):
        raise UserError("training.precision must be float32 or auto where the device has no bfloat16, got bfloat16")
    processes = count_processes(options, accelerator)
    data, tensor = grid(options, processes)
    low = options.precision is Precision.bfloat16 or (
        options.precision is Precision.auto and computes_bfloat16(accelerator)
    )
    threads = options.threads or max(1, cpu_count() * options.nodes // processes)
    return Placement(options.strategy, accelerator, options.nodes, data, tensor, threads, low)


def refuse_shape(config: Shape, options: Training) -> None:
    """Raises `UserError` for options that no network of that shape can be trained with, or not here."""
    for name in ("packing", "activation_checkpointing"):
        if isinstance(config, LstmConfig) and getattr(options, name):
            raise UserError(f"training.{name} must be false for an LSTM, got true")
    refuse_unsplittable(config, place(options).tensor)


def count_processes(options: Training, accelerator: str) -> int:
    """How many there are in all. Raises `UserError` if the devices do not suffice."""
    launched = world_size()  # 1 if nobody started several
    if launched > 1 and options.processes not in (0, launched):
        raise UserError(
            f"training.processes must be 0 or the {launched} processes that were started, got {options.processes}"
        )
    processes = options.processes or (launched if launched > 1 else 0)
    if not processes and options.strategy is Strategy.single:
        processes = options.nodes
    if not processes and accelerator == "cuda":
        processes = options.nodes * torch.cuda.device_count()
    if not processes:
        raise UserError(
            f"training.processes must say how many processes share the cores with strategy {options.strategy.name} "
            "on the CPU, got 0"
        )
    if processes % options.nodes:
        raise UserError(f"training.processes must be divisible by training.nodes ({options.nodes}), got {processes}")
    there = torch.cuda.device_count() if accelerator == "cuda" else cpu_count()
    if processes // options.nodes > there:
        kind = "CUDA devices" if accelerator == "cuda" else "cores"
        raise UserError(
            f"training.processes must be at most {there * options.nodes}: a node has {there} {kind}, got {processes}"
        )
    return processes


def grid(options: Training, processes: int) -> tuple[int, int]:
    """How many processes see different sequences, and how many share every matrix product.

    Raises `UserError` if that does not fit the strategy or the batch.
    """
    if options.strategy is Strategy.single and processes > 1:
        raise UserError(
            f"training.strategy must be ddp, fsdp, tensor_parallel or hybrid for {processes} processes, got single"
        )
    tensor = count_tensor(options, processes)
    data = processes // tensor
    Share(ranks=data, accumulate=options.accumulate).check(options.batch_size)
    return data, tensor


def count_tensor(options: Training, processes: int) -> int:
    """How many processes share a matrix. Raises `UserError` if that does not fit the strategy."""
    asked = options.tensor_parallel
    if options.strategy is Strategy.tensor_parallel:
        if asked not in (0, processes):
            raise UserError(
                f"training.tensor_parallel must be 0 or all {processes} processes with strategy tensor_parallel, got "
                f"{asked}; strategy hybrid has groups"
            )
        return processes
    if options.strategy is Strategy.hybrid:
        if asked < 2 or processes % asked:
            raise UserError(
                f"training.tensor_parallel must be at least 2 and divide the {processes} processes with strategy "
                f"hybrid, got {asked}"
            )
        return asked
    if asked > 1:
        raise UserError(
            f"training.tensor_parallel must be 0 with strategy {options.strategy.name}, got {asked}; strategies "
            "tensor_parallel and hybrid share matrices"
        )
    return 1


def roofs(options: Training) -> Json | None:
    """The ceilings of what a fit with these options computes on: all devices of a node count as one.

    Measured first if they are not known yet (half a minute). None in processes other than the first, which tell nobody,
    and, with a sentence on stderr, if they cannot be measured: a fit does not need them, its utilisation stays unknown.
    """
    if rank() > 0:
        return None
    placement = place(options)
    per_node = placement.processes // placement.nodes
    try:
        if placement.accelerator == "cuda":
            return ceilings(placement.threads, "cuda:0")
        return ceilings(min(cpu_count(), placement.threads * per_node))
    except RuntimeError as error:
        sys.stderr.write(f"{error}; model FLOP utilisation stays unknown\n")
        return None


def matmul_rate(found: Json | None, placement: Placement) -> float | None:
    """FLOPs per second that all processes together could multiply at, or None where that is not known."""
    rate: float | None = found["matmul_flops_per_second"]["bfloat16" if placement.low else "float32"] if found else None
    if rate is None:
        return None
    return rate * (placement.processes if placement.accelerator == "cuda" else placement.nodes)
