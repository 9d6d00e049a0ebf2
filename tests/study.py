"""A made-up study: predictions, measurements and a confirmation shaped like real ones, drawn by seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hasten.evaluation.conditions import Conditions, Repetition
from hasten.evaluation.continuation import summary
from hasten.evaluation.latency import speed
from hasten.evaluation.quality import by_task, pooled
from hasten.evaluation.roofline import Work, nothing, roofline
from hasten.model.config import ModelConfig
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample

Json = dict[str, Any]
QUIET = Conditions(2.0, 2, 0.02, 0.0, why={"energy_joules": "no RAPL counters"})
CEILINGS: Json = {
    "read_bytes_per_second": [
        {"working_set_bytes": 2**20, "bytes_per_second": 1.8e11},
        {"working_set_bytes": 2**30, "bytes_per_second": 4.2e10},
    ],
    "cache_bytes_per_second": 1.8e11,
    "dram_bytes_per_second": 4.2e10,
    "matmul_flops_per_second": {"float32": 2.1e11, "bfloat16": 7e11, "float16": None, "int8": None},
    "validity": "valid",
    "date": "2026-11-23",
    "why": {"matmul_flops_per_second.int8": "no kernel"},
}
TASKS = {
    "question_type": ("en", 0.74, (" person", " place", " number"), 1),
    "reply_choice": ("en", 0.30, (" A", " B", " C", " D"), 2),
    "sentiment_en": ("en", 0.76, (" good", " bad"), 1),
    "sentiment_zh": ("zh", 0.83, ("正面", "负面"), 1),
}
BASELINES = {
    "question_type": (0.24, 0.83),
    "reply_choice": (0.26, 0.57),
    "sentiment_en": (0.52, 0.79),
    "sentiment_zh": (0.51, 0.85),
}


@dataclass(frozen=True)
class Made:
    """A trial to make up. lost, gained: share of the baseline's right and wrong answers that flip."""

    trial: str
    lineage: tuple[str, ...]
    method: str
    latency: float
    lost: float = 0.0
    gained: float = 0.0
    lost_zh: float | None = None
    megabytes: float = 27.5
    status: str = "ok"
    error: str | None = None
    native: bool = True
    kernel: str = "F32"
    noise: float = 0.02


STUDY = (
    Made("baseline@eager", ("baseline",), "identity", 0.412, kernel="float32"),
    Made("baseline@llamacpp", ("baseline",), "identity", 0.131, 0.001, 0.001, kernel="F32 (AVX2)"),
    Made("int8@llamacpp", ("baseline", "int8"), "rtn", 0.058, 0.004, 0.009, megabytes=7.6, kernel="Q8_0 (AVX2)"),
    Made("int4@llamacpp", ("baseline", "int4"), "rtn", 0.049, 0.10, 0.12, megabytes=4.3, kernel="Q4_0 (AVX2)"),
    Made("int8@eager", ("baseline", "int8"), "rtn", 0.43, 0.004, 0.009, megabytes=7.6, native=False, kernel="float32"),
    Made("depth@eager", ("baseline", "depth"), "depth", 0.29, 0.06, 0.06, megabytes=20.1, kernel="float32"),
    Made("depth@llamacpp", ("baseline", "depth"), "depth", 0.094, 0.06, 0.06, megabytes=20.1, kernel="F32 (AVX2)"),
    Made(
        "depth-int8@llamacpp", ("baseline", "depth", "depth-int8"), "rtn", 0.045, 0.07, 0.10, megabytes=5.9,
        kernel="Q8_0 (AVX2)", noise=0.05,
    ),
    Made(
        "depth-int4@llamacpp", ("baseline", "depth", "depth-int4"), "rtn", 0.037, 0.14, 0.07, 0.30, megabytes=3.4,
        kernel="Q4_0 (AVX2)",
    ),
    Made(
        "int8-channel@llamacpp", ("baseline", "int8-channel"), "rtn", 0.0, status="refused",
        error="llamacpp has no format for integers with one scale per channel; use group_size 32",
    ),
    Made("int4@eager", ("baseline", "int4"), "rtn", 0.0, status="failed", error="it was still running after 600 s"),
)  # fmt: skip


def predictions(made: Made, split: str, items: int, seed: int = 0) -> list[Json]:
    """Rows as in `predictions/T.parquet`; `items` per task."""
    rows: list[Json] = []
    for task, (language, accuracy, words, cluster) in TASKS.items():
        shared = np.random.default_rng([seed, items, len(task), ord(task[-1])])
        right, truth = shared.random(items) < accuracy, shared.integers(0, len(words), items)
        flips = np.random.default_rng([seed, items, *made.trial.encode()[:12], len(task), ord(task[-1])]).random(items)
        lost = made.lost if language != "zh" or made.lost_zh is None else made.lost_zh
        correct = np.where(right, flips >= lost, flips < made.gained)
        rows += [
            {
                "task": task, "split": split, "item_id": f"{task}-{split}-{i}", "cluster_id": f"c{i // cluster}",
                "language": language, "expected": words[truth[i]],
                "output": words[truth[i]] if correct[i] else words[truth[i] - 1],
                "correct": float(correct[i]), "output_tokens": 2,
            }
            for i in range(items)
        ]  # fmt: skip
    return rows


def samples(made: Made, count: int, seed: int = 0, drift: float = 0.0) -> list[Sample]:
    """Timed requests of 128 + 64 tokens around the trial's latency."""
    generator = np.random.default_rng([seed, *made.trial.encode()])
    latency = made.latency * np.exp(generator.normal(drift, made.noise, count))
    return [Sample(0.22 * x, 0.78 * x / 63, x, 128, 64, x) for x in latency.tolist()]


def measurement(made: Made, items: int = 300, requests: int = 24) -> Json:
    rows = predictions(made, "validation", items) if made.status == "ok" else []
    manifests = {
        task: {
            "language": language,
            "baselines": {"majority": {"validation": BASELINES[task][0]}, "tfidf": {"validation": BASELINES[task][1]}},
        }
        for task, (language, *_) in TASKS.items()
    }
    variant, _, engine = made.trial.partition("@")
    ok = made.status == "ok"
    speeds = {"qa": speed(Qa(), [Repetition(samples(made, requests), QUIET)])} if ok else {}
    return {
        "schema": 1, "trial": made.trial, "variant": variant, "engine": engine, "status": made.status,
        "error": made.error, "native": made.native if ok else None, "lineage": list(made.lineage),
        "method": made.method, "grid": None,
        "machine": {
            "id": "8b1a0c3fd2e4", "cpu": "AMD EPYC 9V74 80-Core Processor", "gpu": [], "threads": 2,
            "libraries": {"torch": "2.13.0"} if engine == "eager" else {"xllamacpp": "2026.10.11549"},
        },
        "options": {"engine": engine, "threads": 2, "weight_dtype": "float32", "kv_cache_dtype": "auto"},
        "kernel": made.kernel if ok else None, "native_format": made.kernel if ok else None,
        "artifact_bytes": int(made.megabytes * 1e6),
        "weight_bytes_per_token": int(made.megabytes * 0.92e6) if ok else None,
        "peak_memory_bytes": int(4e8 if engine == "eager" else 9e7) if ok else None,
        "memory": {"weights": None, "kv_cache": None}, "load_seconds": 0.21 if ok else None,
        "compile_seconds": (0.0 if engine == "eager" else 1.3) if ok else None, "build": None,
        "quality": by_task(rows, manifests), "pooled": pooled(rows),
        "agreement": {"reference": f"{variant}@eager", "share": 0.996, "n": len(rows)} if ok else None,
        "bits_per_byte": {"en": 1.71 + made.lost, "zh": 2.13 + made.lost} if ok else None,
        "bits_per_byte_ci95": {"en": [1.66, 1.77], "zh": [2.05, 2.2]} if ok else None,
        "continuation": summary(continuations(made)), "headline": {"qa": "latency_seconds_p50"},
        "kv_bytes_per_position": 3072 if ok else None, "arithmetic": "float32" if ok else None, "affinity": [0, 1],
        "peak_memory_apart_from_kv_bytes": int(8e7) if ok else None, "peak_gpu_memory_bytes": None,
        "speed": speeds, **limits(made, speeds), "why": {"peak_gpu_memory_bytes": "no GPU is used"},
    }  # fmt: skip


def limits(made: Made, speeds: Json) -> Json:
    """`ceilings`, `mbu`, `mfu`, `bound` and `roofline` of a trial."""
    if not speeds:
        return {key: value for key, value in nothing("the trial did not run").items() if key != "why"}
    work = Work(ModelConfig(vocab_size=8192), int(made.megabytes * 0.92e6), 3072, "float32")
    return {key: value for key, value in roofline(work, speeds, CEILINGS).items() if key != "why"}


def continuations(made: Made, count: int = 4) -> list[Json]:
    """Rows as in `continuations/T.parquet`."""
    if made.status != "ok":
        return []
    return [
        {
            "language": language, "prompt_id": f"{language}-{i}", "prompt": "so it was", "output": " a word",
            "output_ids": [5, 6, 7, 8, 9, 10], "bits": 40.0 + 90 * made.lost + i, "bytes": 21,
            "repetition_rate": 0.2 + made.lost, "tokens_until_divergence": 6 if made.lost == 0 else 2 + i,
            "diverged": made.lost > 0, "reference": " a word", "reference_bits": 40.0 + i, "reference_bytes": 21,
            "reference_repetition_rate": 0.2,
        }
        for language in ("en", "zh")
        for i in range(count)
    ]  # fmt: skip


def measurements(study: tuple[Made, ...] = STUDY, items: int = 300) -> list[Json]:
    return [measurement(made, items) for made in study]


def frames(study: tuple[Made, ...] = STUDY, items: int = 300) -> dict[str, pd.DataFrame]:
    """Validation predictions by trial."""
    return {made.trial: pd.DataFrame(predictions(made, "validation", items)) for made in study if made.status == "ok"}


def confirmation(
    finalists: Json, study: tuple[Made, ...] = STUDY, items: int = 600, rounds: int = 4, passes: int = 5
) -> tuple[Json, pd.DataFrame]:
    """`confirmation.json` and `confirmation.parquet` for the finalists."""
    known = {made.trial: made for made in study}
    scenarios: Json = {}
    trials: dict[str, None] = {}
    for name, entry in finalists["scenarios"].items():
        names = [entry["reference"], *entry["finalists"]] if entry["reference"] else []
        trials |= dict.fromkeys(names)
        scenarios[name] = {
            "reference": entry["reference"], "rounds_first_stage": rounds, "rounds_wanted": rounds, "why": None,
            "together": True, "apart": None,
            "conditions": [[QUIET.to_json() | {"attempts": 1, "quiet": True}] * passes] * rounds,
            "trials": {
                trial: {
                    "status": "ok", "error": None, "validity": "valid", "headline": "latency_seconds",
                    "lower_is_better": True, "kernel": known[trial].kernel,
                    "rounds": [
                        [
                            [s.latency_seconds for s in samples(known[trial], 8, 100 * number + one, 0.02 * number)]
                            for one in range(passes)
                        ]
                        for number in range(rounds)
                    ],
                }
                for trial in names
            },
        }  # fmt: skip
    rows = [{"trial": trial, **row} for trial in trials for row in predictions(known[trial], "test", items, seed=7)]
    return {"schema": 1, "plan": finalists["plan"], "scenarios": scenarios}, pd.DataFrame(rows)
