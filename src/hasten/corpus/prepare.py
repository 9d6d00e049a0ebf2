"""From sources and tasks to `tokenizer/`, `tokens/` and `tasks/`.

Order matters: tasks first, because what they will ask must not be in the text; then the text, the
tokenizer trained on its training split (and the tasks' training items), the tokens, and at last the
proof that no passage of a validation or test item is left in them.

    python pipelines/prepare.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from hasten.artifacts import SCHEMA, Json, digest, replacing, write_json
from hasten.corpus.base import Source
from hasten.corpus.collect import Spool, collect
from hasten.corpus.decontaminate import Screen, passages
from hasten.errors import UserError
from hasten.hardware import cpu_count
from hasten.task.base import SPLITS, Item, Task
from hasten.tokenizer.base import TokenizerRecipe, TrainingText, load_tokenizer

Items = dict[str, dict[str, list[Item]]]
"""Task -> split -> items."""


def prepare(
    sources: dict[str, Source],
    tasks: dict[str, Task],
    tokenizer: TokenizerRecipe,
    folder: Path,
    *,
    validation_fraction: float = 0.02,
    seed: int = 0,
    workers: int = 0,
) -> Json:
    """Write `tokenizer/`, `tokens/` and `tasks/` into `folder`, each at once, and return facts for the run record.

    validation_fraction: share of documents. workers: processes, 0 means one per core; the bytes do not
    depend on it. Raises `UserError` for sources and tasks that cannot be read or hold nothing.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction must be between 0 and 1, got {validation_fraction}")
    if workers < 0:
        raise UserError(f"workers must be 0 (one per core) or more, got {workers}")
    workers = workers or cpu_count()
    _sweep(folder)
    clock = _Clock()
    items = _all_items(tasks)
    held_out, texts = _protected(tasks, items)
    wanted = sorted({passage for text in texts.values() for passage in text})
    clock.lap("tasks")
    with _scratch(folder / ".spool") as scratch:
        with _progress("reading and screening documents", None) as advance:
            spool = collect(
                sources,
                Screen.against(wanted),
                held_out,
                scratch / "documents",
                validation_fraction=validation_fraction,
                seed=seed,
                workers=workers,
                advance=advance,
            )
        _refuse_empty(spool)
        clock.lap("documents")
        _build_tokenizer(tokenizer, spool, items, folder / "tokenizer")
        clock.lap("tokenizer")
        facts: Json = {
            "seed": seed,
            "validation_fraction": validation_fraction,
            "sources": {name: {"options": _options(s), **spool.counts[name]} for name, s in sources.items()},
            "contamination": _contamination(spool, texts),
        }
        manifest = _write_tokens(spool, folder, wanted, facts, workers)
        clock.lap("tokens")
    manifests = _write_tasks(tasks, items, folder)
    clock.lap("baselines")
    return {
        "seconds": clock.seconds,
        "splits": manifest["splits"],
        "sources": manifest["sources"],
        "contamination": manifest["contamination"],
        "vocab_size": manifest["vocab_size"],
        "tasks": {name: {key: m[key] for key in ("n", "baselines")} for name, m in manifests.items()},
    }


def _all_items(tasks: dict[str, Task]) -> Items:
    items = {name: {split: list(task.items(split)) for split in SPLITS} for name, task in tasks.items()}
    for name, by_split in items.items():
        for split in ("validation", "test"):
            if not by_split[split]:
                raise UserError(f"task {name} has no items in its {split} split")
    return items


def _protected(tasks: dict[str, Task], items: Items) -> tuple[set[str], dict[tuple[str, str], list[tuple[str, ...]]]]:
    """Ids of documents to hold out, and the passages to look for by (task, item id)."""
    held_out: set[str] = set()
    texts: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for name, task in tasks.items():
        for item in chain(items[name]["validation"], items[name]["test"]):
            held_out.add(item.cluster)
            texts[name, item.id] = [passage for text in task.protected(item) for passage in passages(text)]
    return held_out, texts


def _refuse_empty(spool: Spool) -> None:
    counts = {name: dict(counts) for name, counts in spool.counts.items()} or "no sources"
    if not spool.documents:
        raise UserError(f"the corpus is empty: no source left a document to train on ({counts})")
    for split in ("train", "validation"):
        if not spool.documents[split]:
            raise UserError(
                f"the corpus has no {split} document: add documents or change validation_fraction ({counts})"
            )


def _build_tokenizer(recipe: TokenizerRecipe, spool: Spool, items: Items, folder: Path) -> None:
    """Training documents, then the tasks' training items: their templates and labels deserve short encodings too."""
    train = [item for by_split in items.values() for item in by_split["train"]]
    sizes = dict(spool.train_bytes)
    for item in train:
        sizes[item.language] = sizes.get(item.language, 0) + len((item.prompt + item.expected).encode())

    def documents() -> Iterator[tuple[str, str]]:
        yield from spool.training_text()
        for item in train:
            yield item.language, item.prompt + item.expected

    with replacing(folder) as temporary, _progress("building the tokenizer", None):
        temporary.mkdir()
        recipe.build(TrainingText(sizes, documents), temporary)


def _write_tokens(spool: Spool, folder: Path, wanted: list[tuple[str, ...]], facts: Json, workers: int) -> Json:
    from hasten.corpus.tokenise import remaining, tokenise

    tokenizer, documents = folder / "tokenizer", spool.documents.total()
    with replacing(folder / "tokens") as temporary:
        temporary.mkdir()
        with _progress("tokenising", documents) as advance:
            described = tokenise(spool, tokenizer, temporary, workers=workers, advance=advance)
        with _progress("checking for task items", documents) as advance:
            left = remaining(temporary, tokenizer, described["dtype"], wanted, workers=workers, advance=advance)
        if left:
            raise RuntimeError(f"{len(left)} passages of task items are left in the tokens, first: {min(left)}")
        facts["contamination"]["remaining"] = len(left)
        files = {path.name: digest(path) for path in sorted(temporary.iterdir())}
        manifest = {"schema": SCHEMA, "kind": "tokens", **described, **facts, "sha256": files}
        manifest["tokenizer_sha256"] = digest(tokenizer / "tokenizer.json")
        write_json(temporary / "manifest.json", manifest)
    return manifest


def _write_tasks(tasks: dict[str, Task], items: Items, folder: Path) -> dict[str, Json]:
    from hasten.task.data import write_task

    tokenizer = load_tokenizer(folder / "tokenizer")
    manifests: dict[str, Json] = {}
    with replacing(folder / "tasks") as temporary, _progress("tasks and their baselines", len(tasks)) as advance:
        temporary.mkdir()
        for name, task in tasks.items():
            (temporary / name).mkdir()
            manifests[name] = write_task(temporary / name, task, items[name], tokenizer)
            advance(1)
    return manifests


def _contamination(spool: Spool, texts: dict[tuple[str, str], list[tuple[str, ...]]]) -> Json:
    """Counts for the manifest; `remaining` is added when the tokens have been checked."""
    total = {key: sum(counts[key] for counts in spool.counts.values()) for key in ("held_out", "contaminated")}
    checked = sum(bool(passages) for passages in texts.values())
    return {
        "checked_items": checked,
        "too_short_items": len(texts) - checked,
        "held_out_documents": total["held_out"],
        "dropped_documents": total["contaminated"],
    }


def _options(component: Any) -> Json:
    """A component's options as plain values."""
    values = {field.name: getattr(component, field.name) for field in fields(component)}
    return {key: value.name if isinstance(value, Enum) else value for key, value in values.items()}


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        now = perf_counter()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now


def _sweep(folder: Path) -> None:
    """Remove the half-written siblings that a killed run could not."""
    for name in ("tokenizer", "tokens", "tasks"):
        for leftover in folder.glob(f".{name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder that is gone afterwards; one that a killed run left behind is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _progress(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; call the value to advance it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(description, total=total)
        yield lambda count: progress.advance(bar, count)
        if total is None:
            done = progress.tasks[0].completed
            progress.update(bar, total=done or 1, completed=done or 1)
