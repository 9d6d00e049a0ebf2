"""A plan's folder in two languages, for a byte-level tokenizer: tokens of both splits, a task, the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from hasten.artifacts import Checkpoint, read_json, write_json
from hasten.task.base import Item
from hasten.task.data import write_task
from hasten.task.jsonl import Jsonl
from hasten.tokenizer.base import load_tokenizer
from tests.evaluation.texts import bilingual, write_tokens

ITEMS = [Item(str(n), str(n), "en", f"Is fox {n} lazy?", " no" if n % 2 else " yes") for n in range(6)]


def write_plan(folder: Path, checkpoint: Checkpoint) -> Path:
    """The plan that `checkpoint`, whose tokenizer it has, could be of."""
    tokenizer = load_tokenizer(checkpoint.path)
    shutil.copytree(checkpoint.path, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    documents = bilingual() * 3
    documents.sort(key=lambda document: document[0])
    tokens = write_tokens(folder / "tokens", tokenizer, documents)
    for name in ("bin", "offsets.npy", "languages.npy"):
        shutil.copyfile(tokens.path / f"validation.{name}", tokens.path / f"train.{name}")
    sizes = {
        language: sum(len(tokenizer.encode(text)) + 2 for one, text in documents if one == language)
        for language in ("en", "zh")
    }
    groups = [
        {"source": "book", "language": name, "splits": {split: {"tokens": size} for split in ("train", "validation")}}
        for name, size in sizes.items()
    ]
    write_json(tokens.path / "manifest.json", {**read_json(tokens.path / "manifest.json"), "groups": groups})
    (folder / "tasks" / "lazy").mkdir(parents=True)
    write_task(folder / "tasks" / "lazy", Jsonl(), dict.fromkeys(("train", "validation", "test"), ITEMS), tokenizer)
    return folder
