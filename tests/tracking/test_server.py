"""With a real MLflow server on 127.0.0.1, which takes seconds to start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hasten.tracking import mirror, track


@dataclass
class Config:
    plan: str = "p"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts an MLflow server on one and the same port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command += ["--artifacts-destination", str(tmp_path / "files")]
        with (tmp_path / "server.log").open("ab") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return started[-1]
        raise TimeoutError((tmp_path / "server.log").read_text())

    yield start
    for process in started:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """The server with the processes it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_that_dies_and_returns_has_every_figure_in_the_end_and_never_slowed_the_work(
    server: Callable[[], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    for name in ("SEND_SECONDS", "RETRY_SECONDS", "LONGEST_RETRY_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.3)
    slowest = 0.0
    first = server()
    with track("work", Config(), inputs={}, record=None) as run:
        for step in range(1, 301):
            if step == 100:
                assert run.mirror is not None and run.mirror.flush(20)
                stop(first)
            if step == 200:
                server()
            began = time.perf_counter()
            run.metrics({"loss": 1 / step, "rate": 0.1}, step)
            if step % 100 == 50:
                run.text(f"samples/step-{step:06d}.md", f"at {step}")
            slowest = max(slowest, time.perf_counter() - began)
            time.sleep(0.01)
    assert slowest < 0.5
    assert capsys.readouterr().err.count("MLflow answers again; what was kept has been sent") == 1
    client = MlflowClient()
    found = [(point.step, point.value) for point in client.get_metric_history(run.id, "loss")]
    assert sorted(found) == [(step, pytest.approx(1 / step)) for step in range(1, 301)]
    assert client.get_run(run.id).info.status == "FINISHED"
    names = [file.path for file in client.list_artifacts(run.id, "samples")]
    assert names == [f"samples/step-{step:06d}.md" for step in (50, 150, 250)]
