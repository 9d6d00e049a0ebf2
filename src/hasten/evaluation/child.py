"""The child's side of `hasten.evaluation.process`: confine itself, listen, answer.

Started as `python -m hasten.evaluation.child <descriptor for answers> <cores, with commas>`. Commands are
read by a thread that does nothing else, so that the end of standard input (nobody waits for an answer any
more) ends this process and what it started even while an engine computes. What the commands mean is in
`hasten.evaluation.worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from hasten.evaluation.process import FRAME

FIRST_TO_GO = "1000"
"""If memory runs out all the same, the kernel is to kill this process and no other (proc(5), oom_score_adj)."""


class Line:
    """What connects this process with the one that waits for it."""

    def __init__(self, answers: int) -> None:
        os.set_inheritable(answers, False)  # what engines start must not hold it open
        self._answers = os.fdopen(answers, "wb")
        commands = os.fdopen(os.dup(0), "rb")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # an engine that reads its input must not eat commands
        os.close(nothing)
        self._commands: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._listen, args=(commands,), daemon=True).start()

    def receive(self) -> Any:
        """The next command."""
        return pickle.loads(self._commands.get())

    def answer(self, **fields: Any) -> None:
        """Send one answer."""
        self._answers.write(json.dumps(fields).encode() + b"\n")
        self._answers.flush()

    def doing(self, what: str) -> None:
        """Say what comes next; should it be the last thing, the sentence about it says so."""
        self.answer(doing=what)

    def _listen(self, commands: BinaryIO) -> None:
        while len(head := commands.read(FRAME.size)) == FRAME.size:
            (size,) = FRAME.unpack(head)
            self._commands.put(commands.read(size))
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def main() -> None:
    answers, cores = int(sys.argv[1]), sys.argv[2]
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    line = Line(answers)
    from hasten.evaluation.worker import serve

    serve(line)


if __name__ == "__main__":
    main()
