"""A task on disk: `<split>.parquet` with one row per item, and a manifest.

TaskData(Path("artifacts/default/tasks/question_type")).items("validation")
"""

from __future__ import annotations

import importlib
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from hasten.artifacts import SCHEMA, Artifact, Json, write_json
from hasten.errors import UserError, one_of
from hasten.task.base import SPLITS, Item, Task
from hasten.task.baselines import MOST_CLASSES, baselines
from hasten.tokenizer.base import Tokenizer

COLUMNS = ("id", "cluster", "language", "prompt", "expected")
MIXED = "mul"
"""ISO 639-2's code for several languages."""


class TaskData(Artifact):
    """The items of a task, as every stage after `prepare` sees them.

    manifest: task (module name), options, language, n per split, classes (completions; null if they
    are not a small set), max_output_tokens (longest completion, end token included), baselines.
    """

    def items(self, split: str) -> list[Item]:
        """The items of a split. Raises `UserError` if the file is missing or corrupt."""
        import pyarrow
        import pyarrow.parquet

        if split not in SPLITS:
            raise one_of("split", split, SPLITS)
        path = self.path / f"{split}.parquet"
        try:
            rows = pyarrow.parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is not a readable task split: {error}") from None
        return [Item(**row) for row in rows]

    @cached_property
    def task(self) -> Task:
        """The task itself, rebuilt with its options, for scoring."""
        return rebuild(self.manifest["task"], self.manifest["options"])


def rebuild(name: str, options: Json) -> Task:
    """The task in module `hasten.task.<name>`, whose class is the module's name in CamelCase."""
    try:
        module = importlib.import_module(f"hasten.task.{name}")
        cls = getattr(module, "".join(part.capitalize() for part in name.split("_")))
        task = cls(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"task {name!r} with options {options} cannot be rebuilt: {error}") from None
    if not isinstance(task, Task):
        raise UserError(f"{name!r} is not a task")
    return task


def write_task(folder: Path, task: Task, items: dict[str, list[Item]], tokenizer: Tokenizer) -> Json:
    """Write a task's items into an existing folder and return its manifest."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(column, pyarrow.string()) for column in COLUMNS])
    for split in SPLITS:
        table = pyarrow.Table.from_pylist([asdict(item) for item in items[split]], schema=schema)
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet", compression="zstd")
    every = [item for split in SPLITS for item in items[split]]
    completions = sorted({item.expected for item in every})
    languages = sorted({item.language for item in every})
    manifest: Json = {
        "schema": SCHEMA,
        "kind": "task",
        "task": type(task).__module__.rsplit(".", 1)[-1],
        "options": asdict(task),
        "language": languages[0] if len(languages) == 1 else MIXED,
        "n": {split: len(items[split]) for split in SPLITS},
        "classes": completions if len(completions) <= MOST_CLASSES else None,
        "max_output_tokens": max(len(tokenizer.completion_ids(text)) for text in completions),
        "longest_prompt_tokens": max(len(tokenizer.prompt_ids(item.prompt)) for item in every),
        "baselines": baselines(task, items),
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def load_tasks(folder: Path) -> list[TaskData]:
    """The tasks below a plan's `tasks` folder, by name. Raises `UserError` if there is none."""
    tasks = [TaskData(path.parent) for path in sorted(folder.glob("*/manifest.json"))]
    if not tasks:
        raise UserError(f"{folder} must hold at least one task folder with a manifest.json, got none")
    return tasks
