"""Checkpoints as they arrive: tiny ones of every family, single or sharded, in any float type."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hasten.artifacts import Json, read_json, write_json
from hasten.importing.checkpoint import import_checkpoint
from hasten.model.config import Activation, ModelConfig
from hasten.model.config_json import to_huggingface
from hasten.model.huggingface import network_tensors
from hasten.model.imported import Huggingface
from tests.tiny import decoder, shape, write_tokenizer

SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA: dict[str, Any] = {
    "head_size": 8,
    "head_norm": True,
    "post_norms": True,
    "offset_norms": True,
    "embedding_scale": True,
    "activation": Activation.gelu_tanh,
    "attention_scale": 0.25,
    "sliding_window": 6,
    "layer_types": [SLIDING, FULL],
    "local_rope_theta": 100.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases, a head of its own": {
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "tied_head": False,
    },
    "mistral": {"sliding_window": 6, "tied_head": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"head_norm": True, "head_size": 12},
    "gemma3_text": GEMMA,
}
UNCHECKED = Huggingface(verify_tokens=0)


def tensors_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in network_tensors(decoder(config, spread=0.2)).items()}


def write_source(
    folder: Path,
    config: ModelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tensors: dict[str, torch.Tensor] | None = None,
    **fields: Any,
) -> Path:
    """A checkpoint in a folder, with its tokenizer. fields: more of config.json, None removes one."""
    config = config or shape()
    write_tokenizer(folder)
    content: Json = to_huggingface(config, bos_id=0, eos_id=1, pad_id=2) | fields
    kept = {key: value for key, value in content.items() if key not in fields or value is not None}
    write_json(folder / "config.json", kept)
    write_tensors(folder, tensors or tensors_of(config, dtype), shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {}
    for part in range(shards):
        name = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        held = {key: tensors[key] for key in sorted(tensors)[part::shards]}
        save_file(held, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(held, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": placed})


def change_json(path: Path, **fields: Any) -> None:
    """Set entries of a JSON file."""
    write_json(path, {**read_json(path), **fields})


def bring(source: Path, recipe: Huggingface = UNCHECKED, tokenizer: Path | None = None) -> Path:
    """Import it beside itself, with its own tokenizer unless another is given."""
    target = source.with_name("base")
    import_checkpoint(source, tokenizer or source, recipe, target)
    return target


def leftovers(folder: Path) -> list[str]:
    """What a broken import might have left in a folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def copy_of(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.with_name(name)))
