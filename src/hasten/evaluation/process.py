"""A child process with limits: it takes commands, it answers, and whatever happens to it ends in one sentence.

Commands go to its standard input, answers come back as lines of JSON on a pipe of their own, so that an
engine's chatter (its stdout becomes our stderr) cannot be taken for one, a full disk cannot lose one, and
no side can wait for the other forever: writing never blocks, and while this side waits it looks ten times a
second at the deadline and at the memory of every child there is. A child over its limit is killed with all
it started. All of this side's waiting takes 0.2% of one core (measured on 2 busy cores; merely waking up ten
times a second takes 0.06%), and 0.05% more for each further child. What the child does is in
`hasten.evaluation.child`.

If this process is killed without a chance to clean up, a small guardian kills its children; should that
be gone as well, a child that still can ends itself when its standard input closes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from hasten.evaluation.limits import GIB, Limits, oom_kills
from hasten.evaluation.tree import process_tree

POLL_SECONDS = 0.1
LAST_WORDS_SECONDS = 0.01
"""How often to look after a child that closed its pipe but has not ended yet."""
END_SECONDS = 30.0
"""How long a killed process may take to go: one that hangs in a driver cannot be killed at all."""
FRAME = struct.Struct(">Q")
"""A command is its length, then its pickle."""


class EndedError(Exception):
    """The child is no more; the message says why, in one sentence."""


class Child(AbstractContextManager["Child"]):
    """A running child process, from the constructor on. `close` (or leaving the context) ends it and all it started.

    cores: which it is confined to, None for all. Not for use by several threads at a time.
    """

    def __init__(self, limits: Limits, cores: list[int] | None, environment: Mapping[str, str]) -> None:
        self.limits = limits
        self.doing: str | None = None
        self.peak_bytes = 0
        """The most memory the tree was seen to hold."""
        self._kills = oom_kills()
        self._limit_bytes = limits.memory
        self._starved = False
        self._unsent, self._received = bytearray(), bytearray()
        self._searched = 0
        self._explained_bytes = 0
        self._closed = False
        reader, writer = os.pipe()
        try:
            confined = ",".join(map(str, cores or ()))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-X", "faulthandler", "-m", "hasten.evaluation.child", str(writer), confined],
                stdin=subprocess.PIPE,
                stdout=2,  # an engine's chatter must not end up in this process' output
                env=environment,
                pass_fds=(writer,),
                start_new_session=True,  # a group of its own, so that all of it can be ended
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        self._replies: int | None = reader
        assert self._process.stdin is not None
        self._commands = self._process.stdin.fileno()
        os.set_blocking(reader, False)
        os.set_blocking(self._commands, False)
        GUARDIAN.watch(self._process.pid)
        self._tree = process_tree(self._process.pid)
        LIVING[self._process.pid] = self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: object) -> None:
        """Hand over a command, without waiting for the child to read it."""
        data = pickle.dumps(command)
        self._unsent += FRAME.pack(len(data)) + data
        self._write()

    def receive(self, deadline: float) -> dict[str, Any]:
        """The child's next answer. Raises `EndedError` if it dies, takes too long or too much memory.

        deadline: by `time.monotonic`. What the child says it is doing goes to `doing`, for the sentence.
        """
        while True:
            while (line := self._line()) is None:
                self._wait(deadline)
            try:
                answer: dict[str, Any] = json.loads(line)
            except ValueError:
                raise EndedError(f"the process gave an answer that is not JSON: {line[:80]!r}") from None
            self.doing = answer.get("doing")
            if self.doing is None:
                return answer

    def close(self) -> None:
        """End the child and everything it started, at once."""
        if self._closed:
            return
        self._closed = True
        self._kill()
        del LIVING[self.pid]
        self._tree.close()
        GUARDIAN.forget(self.pid)  # before its number can be given to another process
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"process {self.pid} could not be ended; it hangs in the kernel\n")
        if self._replies is not None:
            os.close(self._replies)
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _wait(self, deadline: float) -> None:
        """Until there is something to read, at most one poll. Raises `EndedError`."""
        code = self._exit_code()  # first: what it said before it died is in the pipe by then
        if self._read():
            return
        if code is not None:
            raise EndedError(self._death(code))
        left = deadline - time.monotonic()
        if left <= 0:
            raise EndedError(
                f"it was still {self.doing or 'running'} after {self.limits.timeout_seconds:g} s and was stopped"
            )
        if self._replies is None:
            time.sleep(min(left, LAST_WORDS_SECONDS))
        else:
            waiting = select.poll()
            waiting.register(self._replies, select.POLLIN)
            if self._unsent:
                waiting.register(self._commands, select.POLLOUT)
            waiting.poll(1000 * min(left, POLL_SECONDS))
        for child in list(LIVING.values()):
            child.look_after()

    def _line(self) -> bytes | None:
        end = self._received.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._received)
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return line

    def _write(self) -> None:
        """What the pipe takes. A child that has died is found out when its answer is read."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._commands, self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

    def _read(self) -> bool:
        """Take what the pipe holds, some megabytes at most; whether there was anything."""
        before = len(self._received)
        for _ in range(64):
            if self._replies is None:
                break
            try:
                data = os.read(self._replies, 2**16)
            except BlockingIOError:
                break
            self._received += data
            if not data:
                os.close(self._replies)
                self._replies = None
        return len(self._received) > before

    def _exit_code(self) -> int | None:
        """Its exit code or -signal, None while it runs. Not reaped: until `close` nobody else gets its number."""
        if not hasattr(os, "waitid"):
            return self._process.poll()
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def look_after(self) -> None:
        """Go on writing; kill it if it holds too much memory."""
        self._write()
        if self._starved:
            return
        held = self._tree.resident_bytes()
        self.peak_bytes = max(self.peak_bytes, held)
        if held <= max(self._limit_bytes, self._explained_bytes):
            return
        exact = self._tree.proportional_bytes()
        if exact is not None and exact <= self._limit_bytes:
            # Shared pages explain the difference. Look closely again when half of what was left may have gone.
            self._explained_bytes = held + (self._limit_bytes - exact) // 2
            return
        self._starved = True
        self._kill()

    def _kill(self) -> None:
        """Its group, and what it started in groups of their own."""
        members = self._tree.members()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _death(self, code: int) -> str:
        if self._starved:
            return f"it used more than {self.limits.memory_sentence}{_while(self.doing)} and was stopped"
        kills = oom_kills()
        starved = None if kills is None or self._kills is None else kills > self._kills
        return death(code, self.doing, starved, self.peak_bytes)


LIVING: dict[int, Child] = {}
"""Every child there is: whoever waits for one looks after all."""


def death(code: int, doing: str | None = None, starved: bool | None = None, held_bytes: int = 0) -> str:
    """In one sentence, what an exit code (-signal) without an answer means.

    starved: whether the kernel killed processes for want of memory meanwhile, None if unknown. held_bytes: what this
    one held.
    """
    if code >= 0:
        return f"the process ended with exit code {code}{_while(doing) or ' before it could report'}"
    if -code != signal.SIGKILL:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"the process crashed ({name}){_while(doing)}"
    if starved is None:
        return f"the process was killed (SIGKILL){_while(doing)}, most likely because memory ran out"
    if starved:
        held = f"it held {held_bytes / GIB:.2g} GiB"
        return f"the kernel killed the process{_while(doing)} because memory ran out ({held})"
    return f"somebody killed the process (SIGKILL){_while(doing)}; memory had not run out"


def _while(doing: str | None) -> str:
    return f" while {doing}" if doing else ""


class Guardian:
    """A process that kills the groups it was told about when this one dies, however that happens.

    A child cannot see to that by itself: it may hang with Python's lock held, and what it started knows nothing of us.
    """

    PROGRAM = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        if self._process is None or self._process.poll() is not None:
            line = "".join(f"+{pid}\n" for pid in LIVING) + line
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", self.PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # what ends our group must not end it
            )
            atexit.register(self._process.communicate)  # closes its input and waits
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


GUARDIAN = Guardian()
