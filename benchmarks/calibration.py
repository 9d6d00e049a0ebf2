"""What calibrating in one language costs the other: methods shown English, Chinese or both, on a plan's tuned model.

    python benchmarks/calibration.py                              # after `make repro`; 45 variants, half an hour
    python benchmarks/calibration.py --settings gptq --seeds 1    # 3 variants

Each variant is made as by `pipelines/compress.py` with `calibration.sequences=64 calibration.length=256
calibration.tasks=0.5` and `+calibration.mixture={zh: 0}`, `{en: 0}` or none; a seed draws other rows. Bits per byte are
those of held-out text (`--tokens` a language), answers those of engine `native` to all validation and test items of a
task a language, by which nothing is selected here. Printed are means over seeds with the lowest and highest; of answers
what they differ by from those of the same seed's calibration on both languages. Which items are asked adds an error of
its own, some half a point for a single seed.

Results are kept in `artifacts/<plan>/calibration-<baseline>-<tokens>.json`; a variant in there is not made again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from hasten.artifacts import Json, Tokens, load_checkpoint, read_json, write_json
from hasten.compression.make import make_variant
from hasten.compression.shared.calibration import Calibrate
from hasten.config import discover
from hasten.engine.native import Native
from hasten.evaluation.bits_per_byte import bits_per_byte
from hasten.evaluation.quality import answer
from hasten.reporting.methods import markdown
from hasten.task.data import load_tasks
from hasten.tokenizer.base import load_tokenizer

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "float": ("identity", {}),
    "gptq": ("gptq", {"bits": 4, "group_size": 0}),
    "sparsegpt": ("sparsegpt", {"sparsity": 0.5}),
    "sparsegpt-2:4": ("sparsegpt", {"pattern": "2:4"}),
    "depth": ("depth", {"criterion": "perplexity", "drop": 2}),
    "width": ("width", {"feed_forward": 0.5}),
}
TASKS = ("sentiment_en", "sentiment_zh")
TEXTS: dict[str, dict[str, float]] = {"both": {}, "English": {"zh": 0}, "Chinese": {"en": 0}}


def cases(settings: list[str], seeds: int) -> Iterator[tuple[str, str, int]]:
    """Setting, text and seed of each variant; the float model once."""
    for setting in settings:
        looks = setting != "float"
        for text in TEXTS if looks else ["both"]:
            for seed in range(seeds if looks else 1):
                yield setting, text, seed


def measured(plan: Path, setting: str, text: str, seed: int, tokens: int) -> Json:
    """Bits per byte by language, and by task which items were answered right."""
    name, options = SETTINGS[setting]
    method, parent = discover("compression")[name](**options), load_checkpoint(plan / "variants" / "baseline")
    drawn = Calibrate(sequences=64, length=256, tasks=0.5, mixture=TEXTS[text]).rows_for(method, plan, parent, seed)
    tokenizer, engine = load_tokenizer(plan / "tokenizer"), Native(threads=1)
    correct: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        variant, _ = make_variant(method, parent, drawn, name="v", target=Path(folder, "v"), seed=seed)
        scores = bits_per_byte(variant, Tokens(plan / "tokens"), tokenizer, max_tokens_per_language=tokens)
        with closing(engine.load(variant, Path(folder, "engine"))) as session:
            for task in (task for task in load_tasks(plan / "tasks") if task.path.name in TASKS):
                for split in ("validation", "test"):
                    rows = answer(
                        session,
                        task,
                        tokenizer,
                        split,
                        engine.max_context,
                        variant.config["vocab_size"],
                        lambda *_: None,
                    )
                    correct.setdefault(task.path.name, []).extend(row["correct"] for row in rows)
    return {"bits_per_byte": {name: score.value for name, score in scores.items()}, "correct": correct}


def table(results: Json, settings: list[str], seeds: int) -> str:
    """Markdown; of the languages and tasks that were measured."""
    first = results[key(settings[0], "both", 0)]
    languages = list(first["bits_per_byte"])
    head = ["setting", "calibrated on", *(f"bits per byte, {name}" for name in languages), *TASKS]
    rows = [head]
    for setting in settings:
        for text in [text for text in TEXTS if key(setting, text, 0) in results]:
            own, both = (
                [results[key(setting, kind, seed)] for seed in range(seeds if setting != "float" else 1)]
                for kind in (text, "both")
            )
            cells = [spread([one["bits_per_byte"][name] for one in own]) for name in languages]
            answers = [
                compared(*([one["correct"][task] for one in group] for group in (own, both)), itself=text == "both")
                for task in TASKS
            ]
            rows.append([setting, text, *cells, *answers])
    return markdown(rows)


def spread(values: list[float]) -> str:
    shown = f"{statistics.mean(values):.4f}"
    return f"{shown} [{min(values):.4f}, {max(values):.4f}]" if len(values) > 1 else shown


def compared(own: list[list[float]], both: list[list[float]], *, itself: bool) -> str:
    """Percent right over seeds; in brackets points more than with the same seed's text in both languages."""
    right, theirs = ([100 * statistics.mean(items) for items in seeds] for seeds in (own, both))
    shown = f"{statistics.mean(right):.1f}"
    if itself:
        return shown
    points = [a - b for a, b in zip(right, theirs, strict=True)]
    low, high = (f" [{min(points):+.1f}", f", {max(points):+.1f}]") if len(points) > 1 else ("", "")
    return f"{shown} ({statistics.mean(points):+.1f}{low}{high})"


def key(setting: str, text: str, seed: int) -> str:
    return f"{setting} {text} {seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", default="default")
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out text a language")
    options = parser.parse_args()
    settings, plan = options.settings.split(","), Path("artifacts", options.plan)
    parent = load_checkpoint(plan / "variants" / "baseline").hash[:12]
    kept = plan / f"calibration-{parent}-{options.tokens}.json"
    results = read_json(kept) if kept.is_file() else {}
    for case in cases(settings, options.seeds):
        if key(*case) not in results:
            results[key(*case)] = measured(plan, *case, options.tokens)
            write_json(kept, results)
    print(table(results, settings, options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
