"""What `benchmarks/training.py` compares: ways to train the same shape, each for a process of its own.

Every one asks a `Gate` for its sequences, and waits there until it is its turn: whoever trains, with whatever loop, has
to ask for data, so all can be stopped and timed in the same place.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from hasten.hardware import cores
from hasten.model.config import ModelConfig
from hasten.model.cost import cost_of
from hasten.model.decoder import Decoder
from hasten.model.shape import write_shape
from hasten.peak import peak_bytes
from hasten.training.data import Batch
from hasten.training.loss import weighted_loss
from hasten.training.optimiser import build_optimiser
from hasten.training.options import Optimiser, Precision, Training

RATE, DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0
DOCUMENT = 128  # tokens of each document, where they are told apart
NEVER = 10**9
TERMINAL = "terminal"  # the thread that plays one


@dataclass(frozen=True)
class Work:
    """What every contender does in a turn: `steps` optimiser steps of `batch` sequences of `length` tokens."""

    config: ModelConfig
    batch: int
    length: int
    steps: int
    turns: int
    low: bool
    device: str
    threads: int
    compile: bool
    folder: Path

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    @property
    def all_steps(self) -> int:
        """More than are ever made, for loops that want to know the end."""
        return self.steps * (self.turns + 2)

    def options(self, optimiser: Optimiser = Optimiser.adamw, *, apart: bool = False) -> Training:
        return Training(
            steps=self.all_steps, batch_size=self.batch, sequence_length=self.length, documents_apart=apart,
            optimiser=optimiser, learning_rate=RATE, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1],
            gradient_clip=CLIP, precision=Precision.bfloat16 if self.low else Precision.float32,
            accelerator=self.device, threads=self.threads, compile=self.compile, sample_prompts=0,
            validate_every_steps=NEVER, checkpoint_every_steps=NEVER,
        )  # fmt: skip


class Turn(NamedTuple):
    """inside: seconds of it in the callback that watches. beside: seconds that threads computed which send figures and
    draw the progress bar. peak, libraries: bytes, at most and before there was a model.
    """

    seconds: float
    inside: float
    beside: float
    peak: int
    libraries: int


class Gate:
    """Hands out sequences, and before the first of a turn waits for the turn. Made when all libraries are loaded."""

    def __init__(self, work: Work, channel: Connection) -> None:
        self.work, self.channel = work, channel
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(work.config.vocab_size, (4 * work.batch, work.length), generator=generator)
        self.libraries = 0 if work.device == "cuda" else psutil.Process().memory_info().rss
        self.handed, self.begun, self.inside, self.beside = 0, 0.0, 0.0, 0.0

    def sequences(self, count: int) -> Tensor:
        """The next ones, (count, length)."""
        if self.handed % (self.work.steps * self.work.batch) == 0:
            self.wait()
        rows = torch.arange(self.handed, self.handed + count) % len(self.ids)
        self.handed += count
        return self.ids[rows]

    def wait(self) -> None:
        """Say how long the turn was (the first time: that all is ready), and go on when it is the next one's time."""
        if self.work.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        peak = torch.cuda.max_memory_allocated() if self.work.device == "cuda" else peak_bytes()[0] or 0
        self.channel.send(Turn(seconds, self.inside, watchers_seconds() - self.beside, peak, self.libraries))
        self.channel.recv()
        self.begun, self.inside, self.beside = time.perf_counter(), 0.0, watchers_seconds()


class Passes(Dataset[Batch]):
    """For hasten: a batch for every step."""

    def __init__(self, gate: Gate, *, apart: bool) -> None:
        self.gate, self.apart = gate, apart

    def __len__(self) -> int:
        return self.gate.work.all_steps

    def __getitem__(self, index: int) -> Batch:
        return batch_of(self.gate.sequences(self.gate.work.batch), apart=self.apart)


class Rows(Dataset[dict[str, Tensor]]):
    """For transformers: an item for every sequence."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __len__(self) -> int:
        return self.gate.work.all_steps * self.gate.work.batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.gate.sequences(1)[0]
        return {"input_ids": row, "labels": row}


def batch_of(ids: Tensor, *, apart: bool = False) -> Batch:
    """What `PackedTokens` makes of (B, T) ids; apart: of documents of the same length."""
    places = torch.arange(ids.shape[1])
    counts = places % DOCUMENT > 0 if apart else places > 0
    weights = counts.float().repeat(len(ids), 1)
    batch = {"ids": ids, "weights": weights, "prompt_tokens": torch.ones(len(ids), dtype=torch.int64)}
    if apart:
        batch["documents"] = (places // DOCUMENT).int().repeat(len(ids), 1)
    return {**batch, "total": weights.sum()}


def hasten(
    work: Work,
    channel: Connection,
    optimiser: Optimiser = Optimiser.adamw,
    *,
    apart: bool = False,
    watched: bool = False,
) -> None:
    from hasten.training.loop import fit

    options = work.options(optimiser, apart=apart)
    metrics: Any = Silent()
    with ExitStack() as stack:
        if watched:
            from hasten.stages import Pretrain
            from hasten.tracking import track

            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work.folder}/mlflow.db"
            draw_on_a_terminal()
            config = Pretrain("benchmark", model=work.config, training=options)
            metrics = stack.enter_context(track("pretrain", config, inputs={}, record=None))
        gate = Gate(work, channel)
        time_the_callback(gate)
        model = Decoder(work.config)
        model.initialise(0)
        fit(
            model, lambda share: Passes(gate, apart=apart), options, steps=work.all_steps, seed=0, title="benchmark",
            scratch=work.folder / "fit", validate=lambda network: {}, metrics=metrics,
        )  # fmt: skip


class Silent:
    """Metrics that nobody reads."""

    def metrics(self, values: dict[str, float | None], step: int | None = None) -> None:
        pass

    def text(self, name: str, content: str) -> None:
        pass

    def describe(self, markdown: str) -> None:
        pass


def time_the_callback(gate: Gate) -> None:
    """Add what the callback that watches takes to the turn's `inside`."""
    from hasten.training.watch import Watch

    plain = Watch.on_train_batch_end

    def timed(self: Watch, *given: Any) -> None:
        start = time.perf_counter()
        plain(self, *given)
        gate.inside += time.perf_counter() - start

    Watch.on_train_batch_end = timed  # type: ignore[method-assign]


def watchers_seconds() -> float:
    """What Python's threads but the first have computed (one sends, one draws); 0 where the system does not tell."""
    total = 0
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.name != TERMINAL:
            path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            total += int(path.read_text().split()[0]) if path.is_file() else 0
    return total / 1e9


def draw_on_a_terminal() -> None:
    """Make standard error a terminal, so that there is a progress bar; what is drawn goes nowhere."""
    os.environ["TERM"] = "xterm-256color"
    reader, terminal = os.openpty()
    os.dup2(terminal, 2)

    def drain() -> None:
        while os.read(reader, 65536):
            pass

    threading.Thread(target=drain, name=TERMINAL, daemon=True).start()


def trainer(work: Work, channel: Connection) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments
    from transformers import Trainer as HuggingFaceTrainer

    gate = Gate(work, channel)
    config = LlamaConfig.from_dict(write_shape(work.config, bos_id=None, eos_id=None, pad_id=None))
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    check_size(model, work)
    arguments = TrainingArguments(
        output_dir=str(work.folder / "trainer"), per_device_train_batch_size=work.batch, max_steps=work.all_steps,
        bf16=work.low, use_cpu=work.device == "cpu", optim="adamw_torch_fused", learning_rate=RATE, weight_decay=DECAY,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, lr_scheduler_type="cosine",
        torch_compile=work.compile, dataloader_num_workers=0, dataloader_pin_memory=work.device == "cuda",
        logging_steps=10, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    HuggingFaceTrainer(model=model, args=arguments, train_dataset=Rows(gate)).train()


def textbook(work: Work, channel: Connection) -> None:
    gate = Gate(work, channel)
    torch.manual_seed(0)
    model = Llama(work.config).to(work.device)
    check_size(model, work)
    called = torch.compile(model) if work.compile else model

    def loss() -> Tensor:
        ids = gate.sequences(work.batch).to(work.device)
        logits = called(ids)[:, :-1]  # (B, T - 1, V)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    loop(gate, model, optimiser, loss)


def bare(work: Work, channel: Connection) -> None:
    gate = Gate(work, channel)
    model = Decoder(work.config)
    model.initialise(0)
    model.to(work.device)
    if work.compile:
        for block in model.blocks():
            block.compile()

    def loss() -> Tensor:
        batch = batch_of(gate.sequences(work.batch))
        return weighted_loss(model, {name: value.to(work.device) for name, value in batch.items()})

    loop(gate, model, build_optimiser(model, work.options()), loss)


def loop(gate: Gate, model: nn.Module, optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    work = gate.work
    for _ in range(work.all_steps):
        with torch.autocast(work.device, dtype=torch.bfloat16, enabled=work.low):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def check_size(model: nn.Module, work: Work) -> None:
    """A contender must train what the others train."""
    assert sum(weight.numel() for weight in model.parameters()) == cost_of(work.config).parameters


class Llama(nn.Module):
    """As it is written by hand where it is all one needs: no biases, no windows, logits of everything."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        turns = config.rope_theta ** -(torch.arange(0, config.head_width, 2) / config.head_width)
        angles = torch.outer(torch.arange(config.context).float(), turns)  # (T, D / 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.head_width
        self.sizes = [heads * self.width for heads in (config.heads, config.kv_heads, config.kv_heads)]
        self.before_attention = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.qkv = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.sizes[0], config.hidden_size, bias=False)
        self.before_gate = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.gate_and_up = nn.Linear(config.hidden_size, 2 * config.feed_forward_size, bias=False)
        self.down = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.qkv(self.before_attention(x)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in parts)  # (B, H, T, D)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_and_up(self.before_gate(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: (B, H, T, D) with the angles of its pairs, (T, D / 2) each."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


CONTENDERS: dict[str, Callable[[Work, Connection], None]] = {
    "hasten": hasten,
    "trainer": trainer,
    "textbook": textbook,
    "bare": bare,
    "muon": lambda work, channel: hasten(work, channel, Optimiser.muon),
    "compiled": lambda work, channel: hasten(replace(work, compile=True), channel),
    "apart": lambda work, channel: hasten(work, channel, apart=True),
    "watched": lambda work, channel: hasten(work, channel, watched=True),
}


def contend(name: str, work: Work, channel: Connection) -> None:
    """The whole of a contender's process. What goes wrong is said through the channel."""
    try:
        os.chdir(work.folder)
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # a progress bar for nobody: none is drawn where there is no terminal
            os.dup2(silence, stream)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores(work.threads) or os.sched_getaffinity(0))
        torch.set_num_threads(work.threads)
        CONTENDERS[name](work, channel)
        channel.send("it came to an end by itself")
    except EOFError:
        pass  # whoever started it has gone
    except BaseException as error:
        channel.send(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
