"""A run's mirror in MLflow: opened at once, filled in the background, patient with a store that goes away.

Nobody waits for the store. What a run says is put in a queue, and a thread sends it, every 10 s at most. That is not
for what sending costs (a batch of 7 figures takes a SQLite store 27 ms), but for what it costs when something is wrong:
a server that hangs holds its caller for minutes, a locked database for 20 s, and meanwhile the work would stand still.

A store that does not answer is asked again after 5 s, 10 s, 20 s and so on, every five minutes in the end; the user is
told when it goes and when it is back. What it has not taken stays in the queue, in order, with the time at which it was
said. Sending twice what had arrived after all does no harm: a database knows a point by its name, step, time and value.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.artifacts import Json
from hasten.tracking.store import connect, first_line

KEY = "hasten.key"
BATCH = 900  # MLflow takes at most 1,000 metrics in one call
SEND_SECONDS = 10.0
RETRY_SECONDS = 5.0  # after the first failure; twice as long after each further one
LONGEST_RETRY_SECONDS = 300.0
GRACE_SECONDS = {"FINISHED": 60.0}
"""How long the end of a run waits for a store that takes nothing; one that takes something is waited for."""
SHORT_GRACE_SECONDS = 10.0  # of a run that failed or was ended: whoever ended it may not wait either


@dataclass(frozen=True)
class Point:
    """A figure (step None), or a point of a curve; milliseconds: when it was said, since 1970."""

    name: str
    value: float
    step: int | None
    milliseconds: int


Action = Callable[[Any], object]
"""What is done with the client: tags, artifacts, the end."""


class Mirror:
    """One run in the store. Raises `UserError` if there is no store to open it in."""

    def __init__(self, record: Json) -> None:
        self.client, self.experiment = connect()
        self.reopened = False
        self.id = self._open(record)
        self._last_steps: dict[str, int] = {}  # of each curve, what the store has
        self._queue: deque[Point | Action] = deque()
        self._change = threading.Condition()  # guards all that follows
        self._asked = self._heard = self._refused_at = 0  # requests to send at once: made, seen, not met
        self._next = 0.0  # when it is time to send (monotonic)
        self._failures = 0  # in a row
        self._lost = self._closed = False
        self._thread: threading.Thread | None = None

    def _open(self, record: Json) -> str:
        from mlflow.entities import Param

        found = self.client.search_runs(
            [self.experiment], f"tags.`{KEY}` = '{record['key']}'", max_results=1, order_by=["start_time DESC"]
        )
        self.reopened = bool(found)
        if found:
            run_id = str(found[0].info.run_id)
            self.client.update_run(run_id, status="RUNNING", name=record["name"])
            join_names(record["tags"], found[0].data.tags.get("dvc_exp_names", ""))
        else:
            run_id = str(self.client.create_run(self.experiment, run_name=record["name"]).info.run_id)
        self.client.log_batch(run_id, tags=as_tags({KEY: record["key"], **record["tags"]}))
        known = set(found[0].data.params) if found else set()
        params = [Param(key, text(value)) for key, value in record["params"].items() if key not in known]
        self.client.log_batch(run_id, params=params)
        return run_id

    def put(self, *items: Point | Action) -> None:
        """Leave something to be sent. Returns at once."""
        with self._change:
            self._queue.extend(items)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"mirror {self.id}", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def tags(self, values: Mapping[str, Any]) -> None:
        """Facts for the table."""
        tags = as_tags(values)
        self.put(lambda client: client.log_batch(self.id, tags=tags))

    def flush(self, grace_seconds: float = SHORT_GRACE_SECONDS) -> bool:
        """Send at once; whether the store took everything.

        Waits while it takes something, until it fails once, and `grace_seconds` for one that does neither.
        """
        with self._change:
            if not self._queue:
                return True
            self._asked += 1
            ticket = self._asked
            self._change.notify_all()
            while self._queue and self._refused_at < ticket:
                if not self._change.wait(grace_seconds):
                    break
            return not self._queue

    def close(self, status: str) -> bool:
        """Send the rest and the end of the run; whether the store took all of it."""
        self.put(lambda client: client.set_terminated(self.id, status))
        sent = self.flush(GRACE_SECONDS.get(status, SHORT_GRACE_SECONDS))
        with self._change:
            self._closed = True
            self._change.notify_all()
            return sent and not self._lost

    def _work(self) -> None:
        """The thread: wait for something to send and for the time to send it."""
        while True:
            with self._change:
                while not self._closed and not self._is_due():
                    self._change.wait(self._next - time.monotonic() if self._queue else None)
                if self._closed:
                    return
                self._heard = self._asked
            error = self._send()
            with self._change:
                self._note(error)
                self._change.notify_all()

    def _is_due(self) -> bool:
        return bool(self._queue) and (self._asked > self._heard or time.monotonic() >= self._next)

    def _send(self) -> Exception | None:
        """Send until the queue is empty, or until the store fails: why."""
        while head := self._head():
            try:
                self._deliver(head)
            except Exception as error:  # whatever a store, its driver or the network may raise
                if not is_refusal(error):
                    return error
                if not self._lost:
                    sys.stderr.write(f"MLflow refuses part of this run ({first_line(error)}); the record has it\n")
                self._lost = True  # dropped: no attempt would ever succeed, and everything behind it would wait
            with self._change:
                for _ in head:
                    self._queue.popleft()
                self._change.notify_all()
        return None

    def _head(self) -> list[Point | Action]:
        """What goes next, in one call: points up to the next action, or that action."""
        with self._change:
            points = itertools.takewhile(lambda item: isinstance(item, Point), self._queue)
            return list(itertools.islice(points, BATCH)) or list(itertools.islice(self._queue, 1))

    def _deliver(self, head: Sequence[Point | Action]) -> None:
        from mlflow.entities import Metric

        points = [item for item in head if isinstance(item, Point)]
        for item in head:
            if not isinstance(item, Point):
                item(self.client)
        fresh, last_steps = self._fresh(points)
        if fresh:
            metrics = [Metric(point.name, point.value, point.milliseconds, point.step or 0) for point in fresh]
            self.client.log_batch(self.id, metrics=metrics)
        self._last_steps = last_steps

    def _fresh(self, points: Sequence[Point]) -> tuple[list[Point], dict[str, int]]:
        """Without the points of curves that the store has; and the last step of each curve when it has these too.

        A fit that goes on from a checkpoint repeats the steps since then.
        """
        fresh, last = [], dict(self._last_steps)
        for point in points:
            if point.step is not None:
                if point.name not in last:
                    last[point.name] = self._last_step(point.name) if self.reopened else -1
                if point.step <= last[point.name]:
                    continue
                last[point.name] = point.step
            fresh.append(point)
        return fresh, last

    def _last_step(self, name: str) -> int:
        """Of a curve in the store; -1 if it has none of that name."""
        try:
            history = self.client.get_metric_history(self.id, name)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            history = []  # so does a store of plain files say it
        return max((point.step for point in history), default=-1)

    def _note(self, error: Exception | None) -> None:
        """When to send again, and what the user is told. Called with the lock held."""
        if error is None:
            if self._failures:
                sys.stderr.write("MLflow answers again; what was kept has been sent\n")
            self._failures, self._next = 0, time.monotonic() + SEND_SECONDS
            return
        if not self._failures:
            sys.stderr.write(f"MLflow does not answer ({first_line(error)}); figures are kept and sent later\n")
        pause = min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2 ** min(self._failures, 16))
        self._failures, self._next, self._refused_at = self._failures + 1, time.monotonic() + pause, self._heard


def is_refusal(error: Exception) -> bool:
    """Whether the fault lies with what was sent, so that the store would never take it."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def as_tags(values: Mapping[str, Any]) -> list[Any]:
    """As MLflow takes them."""
    from mlflow.entities import RunTag

    return [RunTag(key, text(value)) for key, value in values.items()]


def join_names(tags: dict[str, Any], names: str) -> None:
    """A run that several DVC experiments share lists all of them."""
    joined = [name for name in [*names.split(","), tags.get("dvc_exp_names") or ""] if name]
    if joined:
        tags["dvc_exp_names"] = ",".join(dict.fromkeys(joined))


def text(value: Any) -> str:
    """A tag's or parameter's value: MLflow keeps 5,000 characters."""
    shown = " > ".join(value) if isinstance(value, list) else str(value)
    return shown[:5000]
