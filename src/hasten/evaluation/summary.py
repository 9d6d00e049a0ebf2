"""What the table of runs shows of a measurement: flat figures, and one line for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hasten.artifacts import Json, read_json
from hasten.engine.base import Engine
from hasten.hardware import libraries, machine

SIZES = ("artifact_bytes", "weight_bytes_per_token", "peak_memory_bytes", "load_seconds", "compile_seconds")


def machine_of(engine: Engine) -> Json:
    """This machine and the versions of an engine's libraries, as `probe` writes them."""
    return {**machine(), "libraries": libraries(engine.libraries)}


def build_cost(record: Path) -> Json | None:
    """What making a variant cost, from the record of its run; None if there is no record."""
    if not record.is_file():
        return None
    metrics = read_json(record)["metrics"]
    names = ("seconds", "tokens", "peak_memory_bytes")
    return {name: metrics.get(f"build_{name}") for name in names}


def figures(measurement: Json) -> dict[str, float | None]:
    """Accuracy per task and language, every scenario's figures, sizes: by flat names."""
    flat: dict[str, float | None] = {name: measurement[name] for name in SIZES}
    for task, quality in measurement["quality"].items():
        for split in ("validation", "test"):
            if split in quality:
                flat[f"{split}_accuracy_{task}"] = quality[split]["accuracy"]
    for split, whole in (measurement["pooled"] or {}).items():
        flat[f"{split}_accuracy"] = whole["accuracy"]
        flat |= {f"{split}_accuracy_{language}": part["accuracy"] for language, part in whole["languages"].items()}
    for scenario, entry in measurement["speed"].items():
        flat |= {f"{scenario}_{name}": entry[name] for name in entry["ci95"]}
    return flat


def tell(measurement: Json) -> None:
    """One line on stderr: what came of a trial."""
    console = Console(stderr=True, highlight=False)
    if measurement["status"] != "ok":
        line = f"{measurement['trial']}: {measurement['status']}: {measurement['error']}"
        console.print(line, style="red", soft_wrap=True)
        return
    parts = [f"{measurement['trial']} ({measurement['kernel']})"]
    whole = (measurement["pooled"] or {}).get("validation")
    if whole:
        parts.append(f"accuracy {100 * whole['accuracy']:.1f}% of {whole['n']}")
    for scenario, entry in measurement["speed"].items():
        rate = entry.get("decode_tokens_per_second")
        speed = f", {rate:,.0f} tokens/s decode" if rate else ""
        parts.append(f"{scenario} {entry['headline']} {entry[entry['headline']]:.4g}{speed} ({entry['validity']})")
    console.print("  ".join(parts), soft_wrap=True)
