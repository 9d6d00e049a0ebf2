"""Your own task: a `.jsonl` file with a prompt and the completion that is right.

    {"prompt": "Capital of France?", "completion": " Paris", "language": "en", "split": "test"}

`id`, `cluster`, `language` and `split` are optional. Without a split, items are split by a hash of
their cluster; without a cluster, of their prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hasten.corpus.text import compact, valid
from hasten.errors import UserError, one_of
from hasten.task.base import SPLITS, Item, Task
from hasten.task.splitting import choose


@dataclass
class Jsonl(Task):
    """path: the file. language: of items that do not say (ISO 639-1)."""

    path: str = ""
    language: str = "en"

    def items(self, split: str) -> Iterator[Item]:
        if split not in SPLITS:
            raise one_of("split", split, SPLITS)
        rows = list(self._rows())
        declared = {name for name, _ in rows}
        if None in declared and len(declared) > 1:
            raise UserError(f"{self.path}: either every line or no line must have a split, some lines have none")
        limit = getattr(self, f"{split}_items")
        if None in declared:
            yield from choose((item for _, item in rows), split, limit)
        else:
            yield from islice((item for name, item in rows if name == split), limit or None)

    def _rows(self) -> Iterator[tuple[str | None, Item]]:
        """(declared split, item) of each line. Raises `UserError` naming the line that cannot be used."""
        if not self.path:
            raise UserError("jsonl.path must name a .jsonl file, got nothing")
        split_of_cluster: dict[str, str | None] = {}
        seen: set[str] = set()
        try:
            with Path(self.path).open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        split, item = self._row(line, number)
                        if item.id in seen:
                            raise UserError(f"{self.path}:{number}: id must be unique, got {item.id!r} again")
                        if split_of_cluster.setdefault(item.cluster, split) != split:
                            raise UserError(f"{self.path}:{number}: cluster {item.cluster!r} is in two splits")
                        seen.add(item.id)
                        yield split, item
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"jsonl.path: cannot read {self.path}: {error}") from None

    def _row(self, line: str, number: int) -> tuple[str | None, Item]:
        place = f"{self.path}:{number}"
        try:
            row: dict[str, Any] = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{place}: a line must be an object with prompt and completion: {error}") from None
        for name, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{place}: {name} must be a text that is not empty, got {value!r}")
        split = row.get("split")
        if split is not None and split not in SPLITS:
            raise one_of(f"{place}: split", split, SPLITS)
        cluster = str(row.get("cluster") or compact(valid(prompt)) or valid(prompt))
        language = str(row.get("language") or self.language)
        return split, Item(str(row.get("id", number)), cluster, language, valid(prompt), valid(completion))
