"""The tensors of a Hugging Face checkpoint, single or sharded: what their headers declare, then their values.

Headers come first, so that a file which asks for the absurd is refused before anything is allocated. safetensors checks
that a file's header is well formed and that offsets, shapes and the file's length agree
(https://github.com/huggingface/safetensors#format). Pickles run code when they are opened and never are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import read_json
from hasten.errors import UserError
from hasten.sources import WEIGHTS, only_pickles

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = WEIGHTS
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BUFFERS = ("rotary_emb.inv_freq",)
"""Endings of what old checkpoints store although it follows from config.json."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a file's header declares it."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by the name it has in a causal language model, values unread.

    Raises `UserError` for weights that are missing, pickled, corrupt, incomplete or of a type that is not covered.
    """
    if (folder / SINGLE).is_file():
        found = read_header(folder / SINGLE)
    elif (folder / INDEX).is_file():
        found = _shards(folder)
    else:
        raise _no_weights(folder)
    kept = {name: tensor for name, tensor in found.items() if not name.endswith(BUFFERS)}
    for name, tensor in kept.items():
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.path.name}: tensors must be one of {', '.join(DTYPES)}, {name} is {tensor.dtype}")
    return {_full_name(name, kept): tensor for name, tensor in kept.items()}


def read_header(path: Path) -> dict[str, Stored]:
    """What one safetensors file declares. Raises `UserError` if it is missing or corrupt."""
    with _opened(path) as file, _explained(path):
        names = list(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        return {name: Stored(path, name, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def read_tensors(stored: dict[str, Stored]) -> dict[str, Tensor]:
    """The values, each in the type it is stored in. Raises `UserError` for NaN and infinite ones."""
    import torch

    tensors: dict[str, Tensor] = {}
    for path in sorted({one.path for one in stored.values()}):
        with _opened(path) as file:
            for name, one in stored.items():
                if one.path == path:
                    with _explained(path):
                        tensors[name] = file.get_tensor(one.key)
                    if not torch.isfinite(tensors[name]).all():
                        raise UserError(f"{path.name}: tensor {name} holds NaN or infinite values")
    return tensors


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    with _explained(path):
        return safe_open(path, framework="pt")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever the library says of a file becomes a `UserError`; a lack of memory is no fault of the file."""
    try:
        yield
    except Exception as error:  # the library's own, the system's and torch's
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path.name} does not fit into the memory that is free") from None
        raise UserError(f"{path.name} is not a readable safetensors file: {error}") from None


def _shards(folder: Path) -> dict[str, Stored]:
    """The tensors of all the files that the index names. Raises `UserError` where they and the index disagree."""
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{INDEX}: weight_map must name the file of each tensor, got {type(placed).__name__}")
    for name, shard in placed.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise UserError(f"{INDEX}: the file of {name} must be a .safetensors file beside it, got {shard!r}")
    found: dict[str, Stored] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{INDEX} names {shard}, which does not exist")
        held = read_header(folder / shard)
        promised = {name for name, place in placed.items() if place == shard}
        if absent := promised - held.keys():
            raise UserError(f"{INDEX} says that {shard} holds {shown(absent)}, which it does not")
        if surplus := held.keys() - promised:
            raise UserError(f"{shard} holds {shown(surplus)}, of which {INDEX} says nothing")
        found |= held
    return found


def _full_name(name: str, names: Iterable[str]) -> str:
    """`model.` in front, where the checkpoint is of the network without its head (`AutoModel.save_pretrained`)."""
    bare = "embed_tokens.weight" in names
    return f"model.{name}" if bare and name != "lm_head.weight" else name


def _no_weights(folder: Path) -> UserError:
    reason = only_pickles(path.name for path in folder.iterdir())
    return UserError(reason or f"it has neither {SINGLE} nor {INDEX}")


def shown(names: Iterable[str], most: int = 3) -> str:
    """The first few of many names."""
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
