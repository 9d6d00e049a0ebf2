"""From a data set to passes, in order, ahead of the trainer and without a state to lose.

A batch is a function of its number (`hasten.training.data`), so all there is to remember is which pass comes next. What
counts is what was handed out, not what workers have read ahead: a fit that is killed and resumed neither skips nor
repeats a batch, and may resume with another number of workers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import get_context, parent_process
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hasten.training.data import Batch

READ_AHEAD = 4
"""Batches per worker that wait to be handed out."""


class Feed:
    """Batches from number `start` on; iterating again goes on where the last iteration was left.

    workers: processes that read ahead; 0 reads in this one, when asked. Lightning keeps `state_dict` in its
    checkpoints, and `len` counts all batches, also those before `start`, as it counts them after a resume.
    """

    def __init__(self, dataset: Dataset[Batch], workers: int = 0, start: int = 0) -> None:
        self.dataset, self.workers, self.next = dataset, workers, start

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=range(self.next, len(self)),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else the loader draws from the one that training draws from
            **(_reading_ahead() if self.workers else {}),
        )
        for batch in loader:
            self.next += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _reading_ahead() -> dict[str, Any]:
    """How workers start: not as copies of a process whose threads (the tracker's, the progress bar's, OpenMP's) may
    hold locks that nobody would ever release in the copy, but from a server that has imported what they need.

    A cluster's scheduler sends SIGTERM to every process of a job. A worker that obeyed, or lost its server to it, would
    fail a trainer that still has to save; so both block that signal, and `_follow` hears it from the trainer alone.
    """
    if sys.platform != "linux":
        return {"multiprocessing_context": get_context("spawn"), "prefetch_factor": READ_AHEAD}
    from multiprocessing import forkserver, resource_tracker

    context = get_context("forkserver")
    context.set_forkserver_preload(["hasten.training.data"])
    resource_tracker.ensure_running()  # now, as it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # what a process blocks, its children do
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return {"multiprocessing_context": context, "prefetch_factor": READ_AHEAD, "worker_init_fn": _settle}


def _settle(worker: int) -> None:
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """In a worker: end with the trainer, or when it says so. Torch watches the parent, but that is the server."""
    trainer = parent_process()
    assert trainer is not None
    while trainer.is_alive():
        heard = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if heard and heard.si_pid == trainer.pid:
            break
    os._exit(0)


def _as_it_is(batch: Any) -> Any:
    return batch
