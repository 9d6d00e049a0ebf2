from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from hasten.training.data import Batch, PackedTokens
from hasten.training.feed import Feed
from tests.tiny import write_tokens


class Counting(Dataset[Batch]):
    """Batch i says i."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __len__(self) -> int:
        return self.passes

    def __getitem__(self, index: int) -> Batch:
        return {"ids": torch.tensor([index])}


def numbers(feed: Iterator[Batch] | Feed) -> list[int]:
    return [int(batch["ids"]) for batch in feed]


def test_every_batch_comes_once_and_in_order() -> None:
    assert numbers(Feed(Counting(7))) == list(range(7))
    assert numbers(Feed(Counting(7), start=5)) == [5, 6]
    assert len(Feed(Counting(7), start=5)) == 7


@pytest.mark.parametrize("handed_out", [0, 1, 4, 7])
def test_a_state_is_what_was_handed_out_and_another_feed_goes_on_from_it(handed_out: int) -> None:
    feed = Feed(Counting(7))
    batches = iter(feed)
    assert [int(next(batches)["ids"]) for _ in range(handed_out)] == list(range(handed_out))
    state = feed.state_dict()
    resumed = Feed(Counting(7))
    resumed.load_state_dict(state)
    assert numbers(resumed) == list(range(handed_out, 7))
    assert numbers(feed) == list(range(handed_out, 7))  # and so does the same one, iterated again


def test_a_state_that_is_loaded_after_the_iteration_was_asked_for_still_counts() -> None:
    feed = Feed(Counting(7))
    batches = iter(feed)
    feed.load_state_dict({"next": 4})
    assert numbers(batches) == [4, 5, 6]


def test_reading_draws_nothing_from_the_random_state_of_training() -> None:
    before = torch.get_rng_state()
    numbers(Feed(Counting(3)))
    assert torch.equal(torch.get_rng_state(), before)


def helpers() -> list[psutil.Process]:
    """What reads ahead: the server and its workers; not the watch over shared memory, which belongs to Python."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends just now
            if "forkserver" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="workers start in another way there")
def test_workers_read_the_same_ahead_and_a_schedulers_sigterm_does_not_end_them(tmp_path: Path) -> None:
    """One test, since the first worker of a process takes seconds to start."""
    tokens = write_tokens(tmp_path / "tokens")
    data = PackedTokens(tokens, "train", steps=40, batch_size=4, length=16, seed=0)
    feed = Feed(data, workers=2)
    batches = iter(feed)
    first = [next(batches) for _ in range(3)]
    assert feed.state_dict() == {"next": 3}  # though more has been read
    running = helpers()
    assert len(running) == 3
    subprocess.run(["kill", "-TERM", *(str(process.pid) for process in running)], check=True)  # not by the trainer
    found = first + list(batches)
    assert len(found) == 40
    for index, batch in enumerate(found):
        assert batch.keys() == data[index].keys()
        assert all(torch.equal(batch[name], data[index][name]) for name in batch)
    resumed = Feed(data, workers=1)
    resumed.load_state_dict({"next": 38})
    assert torch.equal(next(iter(resumed))["ids"], data[38]["ids"])  # left in the middle
    deadline = time.monotonic() + 20
    while len(helpers()) > 1 and time.monotonic() < deadline:  # the server stays, for the next feed
        time.sleep(0.05)
    assert len(helpers()) == 1


LEAVE = """
import sys
from pathlib import Path
from hasten.artifacts import Tokens
from hasten.training.data import PackedTokens
from hasten.training.feed import Feed

if __name__ == "__main__":
    data = PackedTokens(Tokens(Path(sys.argv[1])), "train", steps=1000, batch_size=4, length=16, seed=0)
    batches = iter(Feed(data, workers=1))
    next(batches)
    sys.stdout.write("reading")
    sys.stdout.flush()
    sys.exit(7) if sys.argv[2] == "leave" else sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers start in another way there")
@pytest.mark.parametrize("end", ["leave", pytest.param("kill", marks=pytest.mark.slow)])
def test_workers_end_with_their_trainer_however_that_ends(tmp_path: Path, end: str) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    command = [sys.executable, str(script), str(tokens.path), end]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"reading"
        if end == "kill":
            process.kill()
        assert process.wait(60) == (7 if end == "leave" else -signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (left := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def in_session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
