"""Checkpoints in and out: our networks as Hugging Face directories.

What is written opens in transformers (`AutoModelForCausalLM.from_pretrained`): `config.json`,
`generation_config.json`, `model.safetensors`, the tokenizer's files, the licence of whatever it was made from.
(An LSTM opens here alone: no library has that architecture.)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.artifacts import SCHEMA, Checkpoint, Json, write_json
from hasten.errors import UserError
from hasten.model.grid import floats, grid_of, quantised_names
from hasten.model.network import Network
from hasten.model.shape import outline, read_shape
from hasten.sources import licence_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)
EMBEDDING = "model.embed_tokens.weight"


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, some at a time: the check takes twice the memory of what it looks at."""
    parts = tensor.reshape(-1).split(2**20)
    wide = (part.float() if part.itemsize == 1 else part for part in parts)  # torch does not ask 8-bit floats
    return all(bool(torch.isfinite(part).all()) for part in wide)


def load_network(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, own: bool = False) -> Network:
    """The network of a checkpoint, integers dequantised. own: a float checkpoint's tensors are copies, each in memory
    of its own that can be given back; else they are views of the file where they have the type asked for.

    Raises `UserError` if tensors and config disagree.
    """
    config = read_shape(checkpoint.config)
    tensors: dict[str, Tensor] = {}
    for name, value in in_turn(checkpoint, own=own):
        if not finite(value):
            raise UserError(f"{checkpoint.path}: tensor {name} holds NaN or infinite values")
        tensors[name] = value.to(dtype)
    model = outline(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tied_head:
        tensors["lm_head.weight"] = tensors.get(EMBEDDING, torch.empty(0))
    problems = sorted(name for name in expected.keys() ^ tensors.keys()) or sorted(
        name for name, shape in expected.items() if tuple(tensors[name].shape) != shape
    )
    if problems:
        shown = ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(f"{checkpoint.path}: tensors do not fit config.json: {shown}")
    model.load_state_dict(tensors, assign=True)
    model.tie()
    return model


def in_turn(checkpoint: Checkpoint, *, own: bool) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors by name, integers dequantised; nobody else holds one that was handed out."""
    if own and not quantised_names(checkpoint.tensors()):
        yield from checkpoint.stored().items()
        return
    stored = floats(checkpoint.tensors(), grid_of(checkpoint))
    for name in list(stored):
        yield name, stored.pop(name)


def checked_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors as they are stored, floats and integers.

    Raises `UserError` where one is missing, of another shape than `config.json` says, not finite, or nobody's.
    """
    tensors = checkpoint.tensors()
    others = {*tensors}
    model = outline(read_shape(checkpoint.config))
    for name, value in model.state_dict().items():
        packed = f"{name}_packed" in tensors
        if name == "lm_head.weight" and model.config.tied_head and name not in tensors and not packed:
            continue
        found = tensors.get(f"{name}_scale" if packed else name)
        if found is None:
            raise UserError(f"{checkpoint.path}: model.safetensors lacks {name}")
        shape = tuple(tensors.get(f"{name}_shape", torch.empty(0)).tolist() if packed else found.shape)
        if shape != tuple(value.shape):
            raise UserError(
                f"{checkpoint.path}: {name} must have shape {tuple(value.shape)} by config.json, got {shape}"
            )
        if not finite(found):
            raise UserError(f"{checkpoint.path}: {name} holds NaN or infinite values")
        others -= {name, *(f"{name}_{part}" for part in ("packed", "scale", "shape"))}
    if others:
        raise UserError(f"{checkpoint.path}: tensors do not fit config.json: {', '.join(sorted(others)[:3])}")
    return tensors


def network_tensors(model: Network) -> dict[str, Tensor]:
    """The tensors to save, float32 on the CPU; a tied head is stored once."""
    state = {name: value.detach().cpu().float().contiguous() for name, value in model.state_dict().items()}
    if model.config.tied_head:
        del state["lm_head.weight"]
    return state


def stored_dtype(tensors: dict[str, Tensor]) -> str:
    """What `config.json` should call the floats of a checkpoint, so that readers lose none of them."""
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"


def save_checkpoint(
    folder: Path,
    config: Json,
    tensors: dict[str, Tensor],
    source: Path,
    manifest: dict[str, Any],
    files: Mapping[str, Json | None] = MappingProxyType({}),
) -> None:
    """Write a Hugging Face directory into `folder` (the caller makes it atomic with `replacing`).

    source: the folder whose tokenizer and licence it inherits: its parent, or the tokenizer of a fresh model. files:
    JSON files of its own, by name; None for one that it does not inherit.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**config, "dtype": stored_dtype(tensors)})
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})
    inherited = [source / name for name in TOKENIZER_FILES if name not in files]
    for path in [*inherited, *licence_files(source)]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    for name, content in files.items():
        if content is not None:
            write_json(folder / name, content)
    write_json(folder / "manifest.json", {"schema": SCHEMA, **manifest})
