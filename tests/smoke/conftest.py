"""A copy of the repository in which the `miniature` plan has run once: the real graph, the real commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """This interpreter's commands first; MLflow in the copy's own store."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "DVC_", "PYTEST"))}
    return env | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file git tracks or would track, in a repository of its own."""
    target = tmp_path_factory.mktemp("repository")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    identity = ["-c", "user.name=smoke", "-c", "user.email=smoke@example.invalid"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run(["git", *identity, *arguments], cwd=target, check=True)
    return target


@pytest.fixture(scope="session")
def run(repository: Path) -> Run:
    """Run a command in the copy; its output, and its exit code unless it is checked."""

    def call(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=repository, env=environment(), capture_output=True, text=True, check=False, timeout=900
        )
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done

    return call


@pytest.fixture(scope="session")
def finished(repository: Path, run: Run) -> Path:
    """The copy after `make repro PLAN=miniature` (without the installation)."""
    run("python", "pipelines/plan.py", "name=miniature")
    run("dvc", "repro")
    return repository
