"""Policy as tests: sizes, layers, light imports, nothing of one machine in the repository."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "transformers",
    "mlflow",
    "lightning",
    "pandas",
    "sklearn",
    "scipy",
    "pyarrow",
    "datasets",
    "matplotlib",
)


def tracked() -> list[Path]:
    """Every file of the repository: those git tracks, and those it would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not listed.returncode, f"git must list what belongs to the repository: {listed.stderr.strip()}"
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def texts() -> Iterator[tuple[str, str]]:
    """(path, content) of every tracked file that is text."""
    for path in tracked():
        try:
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def python_files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for folder in ("src", "tests", "pipelines")
        for path in python_files(folder)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_an_entry_point_is_at_most_50_lines_and_says_how_to_call_it() -> None:
    for path in python_files("pipelines"):
        text = path.read_text()
        assert len(text.splitlines()) <= 50, path.name
        assert f"python pipelines/{path.name}" in (ast.get_docstring(ast.parse(text)) or ""), path.name


def test_no_entry_point_hides_a_module_of_the_standard_library() -> None:
    """`python pipelines/x.py` puts the folder before the standard library: a `select.py` there breaks `subprocess`."""
    assert {path.stem for path in python_files("pipelines")} & sys.stdlib_module_names == set()


def test_mlflow_is_imported_by_the_tracking_package_alone() -> None:
    users = {
        path.relative_to(ROOT).parts[:3]
        for folder in ("src", "pipelines")
        for path in python_files(folder)
        if any(module.split(".")[0] == "mlflow" for module in imports(path))
    }
    assert users == {("src", "hasten", "tracking")}


def test_every_module_says_what_it_is_for() -> None:
    for folder in ("src", "pipelines"):
        for path in python_files(folder):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_is_named_utils_and_nothing_prints() -> None:
    assert not [path for path in python_files("src") if path.stem in ("utils", "util", "helpers", "common", "misc")]
    calls = [
        path
        for path in python_files("src")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def loaded_by(statement: str) -> tuple[set[str], float]:
    """Top-level modules that a fresh interpreter holds after a statement, and how long the statement took."""
    script = (
        "import json, sys, time\nbegan = time.perf_counter()\n"
        f"{statement}\nspent = time.perf_counter() - began\n"
        "print(json.dumps([sorted({name.split('.')[0] for name in sys.modules}), spent]))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True, check=True)
    modules, seconds = json.loads(done.stdout)
    return set(modules), float(seconds)


def test_importing_hasten_takes_less_than_half_a_second() -> None:
    assert min(loaded_by("import hasten")[1] for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "module", ["hasten.stages", "hasten.config", "hasten.evaluation.trial", "hasten.evaluation.worker"]
)
def test_what_every_stage_imports_stays_light(module: str) -> None:
    modules, _ = loaded_by(f"import {module}")
    assert "hasten" in modules
    assert modules & set(HEAVY) == set()


def test_discovering_every_component_stays_light() -> None:
    statement = "from hasten.config import AXES, discover\nfor axis in AXES: discover(axis)"
    modules, _ = loaded_by(statement)
    assert modules & set(HEAVY) == set()


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    script = (
        "import os, sys, signal, importlib, pkgutil, hasten\n"
        "before = dict(os.environ), signal.getsignal(signal.SIGTERM), len(os.listdir())\n"
        "for module in pkgutil.walk_packages(hasten.__path__, 'hasten.'):\n"
        "    if module.name not in ('hasten.tracking.champion',):\n"  # it is code that MLflow runs
        "        importlib.import_module(module.name)\n"
        "environment = {name: value for name, value in os.environ.items() if name in before[0]}\n"
        "assert (environment, signal.getsignal(signal.SIGTERM), len(os.listdir())) == before\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


# Written in pieces, so that this file does not name what it forbids.
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download." + "pytorch.org",
    "hf" + "-mirror",
    "conda." + "anaconda.org",
]
FOLDERS = ["work", "home", "root", "opt", "tmp", "mnt", "Users", "srv"]


def test_no_tracked_text_names_a_package_registry() -> None:
    found = {(name, host) for name, content in texts() for host in HOSTS if host in content}
    found |= {(name, "an index") for name, content in texts() if re.search(r"(extra-)?index-url[ =]+https?:", content)}
    assert found == set()


def test_no_tracked_text_names_a_folder_of_one_machine() -> None:
    absolute = re.compile(r"(?<![\w.$}~*:/-])/(" + "|".join(FOLDERS) + r")/[\w.-]+")
    found = {(name, match[0]) for name, content in texts() if name != "LICENSE" for match in absolute.finditer(content)}
    assert found == set()


def test_nothing_large_or_made_by_a_run_is_tracked() -> None:
    large = {path.relative_to(ROOT).as_posix() for path in tracked() if path.stat().st_size > 1_500_000}
    assert large == set()
    made = ("artifacts/", ".work/", "mlflow.db", "mlruns/", "multirun/", ".venv/")
    assert not [path for path in tracked() if path.relative_to(ROOT).as_posix().startswith(made)]


def test_notebooks_are_tracked_without_their_outputs() -> None:
    for path in tracked():
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path.name


def test_imports_only_point_down() -> None:
    """The layers of pyproject.toml, kept by import-linter."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
