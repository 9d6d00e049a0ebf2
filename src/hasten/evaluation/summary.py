"""What the table of runs shows of a measurement: flat figures, and one line for the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from hasten.artifacts import Json, read_json
from hasten.ceilings import ceilings
from hasten.engine.base import Engine
from hasten.hardware import cores, machine

SIZES = (
    "artifact_bytes",
    "weight_bytes_per_token",
    "kv_bytes_per_position",
    "peak_memory_bytes",
    "peak_memory_apart_from_kv_bytes",
    "peak_gpu_memory_bytes",
    "load_seconds",
    "compile_seconds",
    "mbu",
    "mfu",
)


def machine_of(engine: Engine) -> Json:
    """This machine and the versions of an engine's libraries, as `probe` writes them."""
    return {**machine(), "libraries": engine.versions()}


def ceilings_of(engine: Engine) -> Json | str:
    """What this machine can do with an engine's threads on its device, measured once; or why it could not be."""
    try:
        return ceilings(engine.thread_count, engine.devices[0], cores=cores(engine.thread_count))
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"the machine's ceilings could not be measured, so mbu and mfu are null: {error}\n")
        return f"the machine's ceilings could not be measured: {error}"


def build_cost(record: Path) -> Json | None:
    """What making a variant cost, from the record of its run; None if there is no record."""
    if not record.is_file():
        return None
    metrics = read_json(record)["metrics"]
    names = ("seconds", "tokens", "peak_memory_bytes")
    return {name: metrics.get(f"build_{name}") for name in names}


def figures(measurement: Json) -> dict[str, float | None]:
    """Accuracy per task and language, long-text quality, every scenario's figures, sizes: by flat names."""
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
        others = ("contention_cores", "energy_joules_per_token", "acceptance_rate", "tokens_per_pass")
        flat |= {f"{scenario}_{name}": entry[name] for name in others}
    flat |= {f"bits_per_byte_{name}": value for name, value in (measurement["bits_per_byte"] or {}).items()}
    return flat | _continued(measurement["continuation"])


def _continued(entry: Json | None) -> dict[str, float | None]:
    """`continuation_bits_per_byte`, `continuation_repetition_rate_zh` and so on."""
    if entry is None:
        return {}
    flat: dict[str, float | None] = {}
    for suffix, part in {"": entry, **{f"_{name}": part for name, part in entry["languages"].items()}}.items():
        for name in ("bits_per_byte", "repetition_rate", "tokens_until_divergence_p50"):
            flat[f"continuation_{name}{suffix}"] = part[name]
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
        if entry["acceptance_rate"] is not None:
            speed += f", {entry['acceptance_rate']:.0%} of guesses right"
        parts.append(f"{scenario} {entry['headline']} {entry[entry['headline']]:.4g}{speed} ({entry['validity']})")
        if why := measurement["roofline"].get(scenario, {}).get("why"):
            parts.append(why)
    console.print("  ".join(parts), soft_wrap=True)
