"""A Hugging Face checkpoint to the plan's base model.

What arrives is checked in the order of its cost: config.json (from the Hub it alone is fetched first), the weights'
headers, the plan's tokenizer, the values, then (`verify_tokens`) what it computes against transformers. What is written
is one directory in the form that every stage reads: config.json with each field that its family leaves to a default,
one safetensors file with the tensors bit for bit in the type they came in, the plan's tokenizer, the licence of where
it came from. The directory appears at once, when all is well, or not at all.

    python pipelines/pretrain.py plan=mine model=huggingface model.path=path/to/checkpoint
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Json, digest, read_json, replacing
from hasten.errors import UserError, one_sentence
from hasten.importing.fit import EMBEDDING, HEAD, check_config, fitting_shape
from hasten.importing.verify import TOLERANCE, check_memory, logit_difference
from hasten.importing.weights import read_tensors, stored_tensors
from hasten.model.config import ModelConfig
from hasten.model.imported import Huggingface
from hasten.model.shape import write_shape
from hasten.sources import README, WEIGHTS, Wanted, commit_of, copy_licences, is_hub, licence_files, origin, resolve
from hasten.tokenizer.base import Tokenizer, load_tokenizer, read_backend

if TYPE_CHECKING:
    from torch import Tensor


def fetch(recipe: Huggingface) -> Path:
    """The folder that holds the checkpoint. From the Hub, weights are fetched only if its config.json is covered."""
    folder = resolve(recipe.path, recipe.revision, recipe.accept_licence, wanted=Wanted.config)
    if not is_hub(recipe.path):
        return folder
    with one_sentence(recipe.path):
        _read_config(folder)
    return resolve(recipe.path, commit_of(folder) or recipe.revision, recipe.accept_licence)


def source_digest(source: Path) -> str:
    """sha256 (hex) of the files that an import reads, by name; others may lie beside them."""
    with one_sentence(source):
        _read_config(source)
        beside = ("config.json", "generation_config.json", "tokenizer.json", README, WEIGHTS[1])
        paths = {source / name for name in beside if (source / name).is_file()} | set(licence_files(source))
        paths |= {one.path for one in stored_tensors(source).values()}
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(f"{path.name}\0{digest(path)}\n".encode())
    return total.hexdigest()


def import_checkpoint(source: Path, tokenizer: Path, recipe: Huggingface, target: Path) -> dict[str, float]:
    """Check the checkpoint in `source` and write it to `target` with the plan's `tokenizer`; figures for the run.

    Raises `UserError`, one sentence, for whatever is not a sound checkpoint of a covered architecture; `target` then
    stays as it was.
    """
    from hasten.model.huggingface import save_checkpoint

    _sweep(target)
    with one_sentence(source):
        config = _read_config(source)
        stored = stored_tensors(source)
        shape = fitting_shape(config, stored)
        reader = load_tokenizer(tokenizer)
        compared = _check_tokenizer(source, reader, shape)
        if recipe.verify_tokens:
            check_memory(stored, shape.vocab_size, recipe.verify_tokens)
        shape, tensors = _untie(shape, read_tensors(stored))
        written = write_shape(shape, bos_id=reader.bos_id, eos_id=reader.eos_id, pad_id=reader.pad_id)
        written["eos_token_id"] = _end_ids(source, config, reader.eos_id, shape.vocab_size)
        _check_finite(written)
        known = origin(recipe.path, recipe.revision, source)
        manifest: Json = {
            "kind": "checkpoint",
            "stage": "pretrain",
            "source": {**known, "model_type": config["model_type"], "sha256": source_digest(source)},
            "tokenizer_compared": compared,
            "grid": None,
        }
        facts = {
            "imported_parameters": float(sum(value.numel() for value in tensors.values())),
            "imported_bytes": float(sum(value.numel() * value.element_size() for value in tensors.values())),
        }
        with replacing(target) as folder:
            if recipe.verify_tokens:
                terms = {"tokens": recipe.verify_tokens, "tolerance": TOLERANCE}
                manifest["verified"] = {"against": "transformers", **terms}
            save_checkpoint(folder, written, tensors, tokenizer, manifest)
            copy_licences(source, folder)
            if recipe.verify_tokens:
                del tensors
                facts["imported_logit_difference"] = logit_difference(source, folder, recipe.verify_tokens)
    return facts


def _sweep(target: Path) -> None:
    """Remove what an import that was killed left beside `target`: each is as large as the model (see `replacing`)."""
    for path in target.parent.glob(f".{target.name}.*"):
        if re.fullmatch(r"[0-9a-f]{8}", path.suffix.removeprefix(".")):
            shutil.rmtree(path)


def _read_config(source: Path) -> Json:
    """Raises `UserError` if there is no checkpoint, or none of the kind that can be imported."""
    if not source.is_dir():
        raise UserError("a checkpoint is a folder with config.json and safetensors, this is none")
    config = read_json(source / "config.json")
    check_config(config)
    return config


def _check_tokenizer(source: Path, reader: Tokenizer, shape: ModelConfig) -> bool:
    """Whether there was a tokenizer to compare with.

    Raises `UserError` if the plan's tokenizer cannot be the one this model was trained with. It may lack tokens, and
    begin, end or pad with one more.
    """
    if reader.vocab_size > shape.vocab_size:
        raise UserError(
            f"the plan's tokenizer must fit the embedding ({shape.vocab_size} rows), got ids up to "
            f"{reader.vocab_size - 1}"
        )
    if not (source / "tokenizer.json").is_file():
        return False
    own = read_backend(source / "tokenizer.json").get_vocab(with_added_tokens=True)
    free = {reader.bos_id, reader.eos_id, reader.pad_id} - set(own.values())
    for number, token in sorted((n, t) for t, n in reader.backend.get_vocab(with_added_tokens=True).items()):
        if own.get(token) != number and not (token not in own and number in free):
            raise UserError(
                f"the plan's tokenizer must be the checkpoint's (tokenizer=imported with the same path), got one in "
                f"which {token!r} is {number}, not {own.get(token, 'unknown')}"
            )
    return True


def _untie(shape: ModelConfig, tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Drop a tied head that is stored as well; one that differs from the embedding is a head of its own."""
    import torch

    if not shape.tied_head or HEAD not in tensors:
        return shape, tensors
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head.dtype == embedding.dtype and torch.equal(head, embedding):
        return shape, {name: value for name, value in tensors.items() if name != HEAD}
    return replace(shape, tied_head=False), tensors


def _end_ids(source: Path, config: Json, eos_id: int, vocab_size: int) -> int | list[int]:
    """The plan's end of text first, then whatever else ends an answer of this model (its end of a turn, say)."""
    named: Any = config.get("eos_token_id")
    if (source / "generation_config.json").is_file():
        named = read_json(source / "generation_config.json").get("eos_token_id") or named
    listed = named if isinstance(named, list) else [named]
    known = [one for one in listed if isinstance(one, int) and not isinstance(one, bool) and 0 <= one < vocab_size]
    ids = list(dict.fromkeys([eos_id, *known]))
    return ids if len(ids) > 1 else eos_id


def _check_finite(config: Json) -> None:
    """JSON has no NaN and no infinity, Python's reader knows both."""
    try:
        json.dumps(config, allow_nan=False)
    except ValueError:
        raise UserError("config.json holds a number that is not finite") from None
