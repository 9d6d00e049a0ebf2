"""Quality: does the engine that is timed still give the right answers?

Every item of a task goes through the same session that is timed: prompt in as token ids, greedy
completion until end of text, its text scored by the task. The outputs are kept item by item, because
differences between variants are only significant when they are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Json, replacing
from hasten.engine.base import Request, Session
from hasten.errors import UserError
from hasten.evaluation.statistics import accuracy
from hasten.scenario.base import Report

if TYPE_CHECKING:
    import pandas as pd

    from hasten.task.data import TaskData
    from hasten.tokenizer.base import Tokenizer

EXTRA_TOKENS = 4
"""How far an answer may run beyond the longest right one: enough to see that it does not stop."""

Row = dict[str, Any]


def answer(
    session: Session,
    data: TaskData,
    tokenizer: Tokenizer,
    split: str,
    max_context: int,
    vocabulary: int,
    report: Report,
) -> list[Row]:
    """A prediction per item of a split: the columns of `predictions/T.parquet`.

    `output` is the decoded completion without special tokens; `output_tokens` counts the end-of-text
    token too. vocabulary: how many token ids there are. Raises `UserError` if a prompt does not fit
    the context, `RuntimeError` if the engine answers what was not asked or not at all.
    """
    items = data.items(split)
    longest = max((len(tokenizer.completion_ids(item.expected)) for item in items), default=0)
    limit = max(longest, int(data.manifest["max_output_tokens"])) + EXTRA_TOKENS  # by the plan's tokenizer, over splits
    stop = frozenset({tokenizer.eos_id})
    requests = [Request(i, tokenizer.prompt_ids(item.prompt), limit, stop, verify=True) for i, item in enumerate(items)]
    for request, item in zip(requests, items, strict=True):
        if len(request.prompt) + limit > max_context:
            raise UserError(
                f"max_context must be at least {len(request.prompt) + limit} for item {item.id} of task "
                f"{data.path.name}, got {max_context}"
            )
    outputs = completions(session, requests, vocabulary, report)
    task = data.task
    rows: list[Row] = []
    for item, ids in zip(items, outputs, strict=True):
        text = tokenizer.decode(ids[:-1] if ids[-1] in stop else ids)
        rows.append(
            {
                "task": data.path.name,
                "split": split,
                "item_id": item.id,
                "cluster_id": item.cluster,
                "language": item.language,
                "expected": item.expected,
                "output": text,
                "correct": float(task.score(text, item)),
                "output_tokens": len(ids),
            }
        )
    return rows


def completions(session: Session, requests: Sequence[Request], vocabulary: int, report: Report) -> list[list[int]]:
    """The token ids of every request, in their order; a request's id is its place.

    vocabulary: how many token ids there are. Raises `RuntimeError` if the engine answers what was not asked, answers
    less or more, or gives an id that does not exist.
    """
    outputs: list[list[int]] = [[] for _ in requests]

    def ended(output: list[int], request: Request) -> bool:
        return len(output) == request.max_tokens or bool(output and output[-1] in request.stop)

    begun = 0
    for token in session.generate(requests):
        if not 0 <= token.request < len(outputs):
            raise RuntimeError(f"the engine answered request {token.request}, which was not asked")
        if not 0 <= token.id < vocabulary:
            raise RuntimeError(f"the engine gave token id {token.id}, the vocabulary has {vocabulary}")
        output = outputs[token.request]
        if ended(output, requests[token.request]):
            raise RuntimeError("the engine went on after the end of a completion")
        if not output:
            begun += 1
            report(begun, len(requests))
        output.append(token.id)
    if begun < len(requests):
        raise RuntimeError(f"the engine answered {begun} of {len(requests)} requests")
    for output, request in zip(outputs, requests, strict=True):
        if not ended(output, request):
            raise RuntimeError(
                f"the engine ended request {request.id} after {len(output)} of {request.max_tokens} tokens"
            )
    return outputs


def by_task(rows: Sequence[Row], manifests: Mapping[str, Json]) -> Json:
    """The `quality` of a measurement: per task its language, accuracy per split, baselines and mean length.

    manifests: the tasks' own, by name; the baselines are those of the first split that was answered.
    """
    quality: Json = {}
    for task, answers in _grouped(rows, "task").items():
        manifest = manifests[task]
        splits = _grouped(answers, "split")
        quality[task] = {
            "language": manifest["language"],
            **{split: _accuracy(part) for split, part in splits.items()},
            "baseline": _baseline(manifest, next(iter(splits))),
            "mean_output_tokens": sum(row["output_tokens"] for row in answers) / len(answers),
        }
    return quality


def _baseline(manifest: Json, split: str) -> Json:
    baselines = manifest.get("baselines") or {"why": "the task's manifest has no baselines"}
    accuracies = {name: (baselines.get(name) or {}).get(split) for name in ("majority", "tfidf")}
    return accuracies | ({"why": baselines["why"]} if "why" in baselines else {})


def pooled(rows: Sequence[Row]) -> Json:
    """Per split: accuracy over the items of all tasks together, and over those of each language."""
    return {
        split: {
            **_accuracy(part),
            "languages": {language: _accuracy(own) for language, own in sorted(_grouped(part, "language").items())},
        }
        for split, part in _grouped(rows, "split").items()
    }


def agreement(rows: Sequence[Row], reference: Sequence[Row]) -> Json:
    """The share of items with the same output as in another run: {share, n}.

    Items that only one of the two has do not count. Raises `UserError` if there is no common item.
    """
    known = {_key(row): row["output"] for row in reference}
    common = [row for row in rows if _key(row) in known]
    if not common:
        raise UserError("the reference predictions must share at least one item with these, got none")
    same = sum(row["output"] == known[_key(row)] for row in common)
    return {"share": same / len(common), "n": len(common)}


def save_predictions(rows: Sequence[Row], path: Path) -> None:
    """Write predictions atomically as parquet; no rows give an empty table with the same columns.

    Rows of several trials carry a `trial` column, which then comes first.
    """
    import pyarrow as pa
    from pyarrow import parquet

    text = ("task", "split", "item_id", "cluster_id", "language", "expected", "output")
    fields = [(name, pa.string()) for name in text] + [("correct", pa.float64()), ("output_tokens", pa.int64())]
    if any("trial" in row for row in rows):
        fields.insert(0, ("trial", pa.string()))
    with replacing(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(list(rows), pa.schema(fields)), temporary)


def load_predictions(path: Path) -> pd.DataFrame:
    """The rows of a predictions file. Raises `UserError` if it is missing or not parquet."""
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is not a readable predictions file: {' '.join(str(error).split())}") from None


def _accuracy(rows: Sequence[Row]) -> Json:
    tasks = [row["task"] for row in rows]
    clusters = [(row["task"], row["cluster_id"]) for row in rows]
    estimate = accuracy([row["correct"] for row in rows], clusters=clusters, strata=tasks)
    return {"accuracy": estimate.value, "n": estimate.n, "ci95": estimate.ci95}


def _key(row: Row) -> tuple[str, str, str]:
    return row["task"], row["split"], row["item_id"]


def _grouped(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups
