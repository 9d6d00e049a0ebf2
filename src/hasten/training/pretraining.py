"""Pre-training: tokens to a base model."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.artifacts import Group, Json, Tokens, replacing
from hasten.errors import UserError
from hasten.model.huggingface import network_tensors, save_checkpoint
from hasten.model.lstm_config import LstmConfig
from hasten.model.network import Network
from hasten.model.shape import Shape, build, write_shape
from hasten.tokenizer.base import load_tokenizer
from hasten.training.data import WHOLE, PackedTokens, Share
from hasten.training.loop import Fitted, fit
from hasten.training.options import Training
from hasten.training.placement import refuse_shape
from hasten.training.review import samples
from hasten.training.watch import Metrics

VALIDATED_AT_ONCE = 4096
"""Tokens in one pass of a validation."""
LOGITS_AT_ONCE = 512
"""Tokens whose logits exist at the same time."""


def refuse_unfit(config: Shape, tokens: Tokens, options: Training) -> None:
    """Raises `UserError` for options that a network of that shape cannot be trained with on that text."""
    if options.sequence_length > config.context:
        raise UserError(
            f"training.sequence_length must be at most model.context ({config.context}), got {options.sequence_length}"
        )
    if options.packing:
        raise UserError("training.packing must be false in pre-training, which packs documents anyway, got true")
    if isinstance(config, LstmConfig) and options.documents_apart:
        raise UserError(
            "training.documents_apart must be false for an LSTM, which reads on from one document to the next, got true"
        )
    refuse_shape(config, options)
    sequences(tokens, options, steps=1, seed=0, encodes_prompt=False)


def sequences(
    tokens: Tokens, options: Training, *, steps: int, seed: int, encodes_prompt: bool, share: Share = WHOLE
) -> PackedTokens:
    """The passes of pre-training."""
    return PackedTokens(
        tokens,
        "train",
        steps=steps,
        batch_size=options.batch_size,
        length=options.sequence_length,
        seed=seed,
        mixture=options.mixture,
        apart=options.documents_apart,
        encodes_prompt=encodes_prompt,
        share=share,
    )


def pretrain(
    tokens: Tokens,
    tokenizer: Path,
    config: Shape,
    options: Training,
    *,
    seed: int,
    scratch: Path,
    target: Path,
    metrics: Metrics,
    ceilings: Json | None = None,
) -> Fitted:
    """Train a network from scratch on `tokens` and write the checkpoint to `target`.

    tokenizer: its folder, copied into the checkpoint.
    """
    refuse_unfit(config, tokens, options)
    reader = load_tokenizer(tokenizer)
    config.vocab_size = config.vocab_size or reader.vocab_size
    if config.vocab_size < reader.vocab_size:
        raise UserError(
            f"model.vocab_size must be 0 or at least the tokenizer's {reader.vocab_size}, got {config.vocab_size}"
        )
    steps = options.steps or math.ceil(
        options.epochs * len(tokens.ids("train")) / (options.batch_size * options.sequence_length)
    )
    model = build(config)
    model.initialise(seed)
    prompts = openings(tokens, options.sample_prompts)
    fitted = fit(
        model,
        lambda share: sequences(
            tokens, options, steps=steps, seed=seed, encodes_prompt=not model.predicts_prompt, share=share
        ),
        options,
        steps=steps,
        scratch=scratch,
        seed=seed,
        validate=lambda network: held_out(network, tokens, options),
        metrics=metrics,
        title="pretrain",
        samples=lambda network: samples(network, prompts, reader, options.sample_tokens),
        ceilings=ceilings,
    )
    if not fitted.exports:
        return fitted
    with replacing(target) as folder:
        ids = {"bos_id": reader.bos_id, "eos_id": reader.eos_id, "pad_id": reader.pad_id}
        manifest = {
            "kind": "checkpoint",
            "stage": "pretrain",
            "steps": fitted.steps,
            "tokens": fitted.tokens,
            "grid": None,
            "validation": fitted.validation,
        }
        save_checkpoint(folder, write_shape(config, **ids), network_tensors(model), tokenizer, manifest)
    shutil.rmtree(scratch, ignore_errors=True)
    return fitted


def openings(tokens: Tokens, count: int, length: int = 16) -> list[list[int]]:
    """How `count` held-out documents begin, (up to `length` ids each), of different groups where there are several."""
    ids, offsets, groups = tokens.ids("validation"), tokens.offsets("validation"), tokens.groups("validation")
    found = []
    for number in range(count if groups else 0):
        group = groups[number % len(groups)]
        document = int(np.searchsorted(offsets, group.start_token)) + number // len(groups)
        if document < len(offsets) - 1:
            start, end = int(offsets[document]), int(offsets[document + 1])
            found.append(ids[start : min(end, start + length)].tolist())
    return [prompt for prompt in found if prompt]


def held_out(model: Network, tokens: Tokens, options: Training) -> dict[str, float]:
    """Loss in nats per token on the validation split, and bits per byte for each language.

    What counts is what counts in training, so documents are apart here if they are there. Every group (source and
    language) is scored in proportion to its size. Bits per byte compares models with different tokenizers: nats per
    token / ln 2 * tokens per byte.
    """
    losses: dict[str, list[Tensor]] = defaultdict(list)
    groups = tokens.groups("validation")
    total = sum(group.tokens for group in groups)
    for group in groups:
        if group.tokens > 1:
            budget = round(options.validation_tokens * group.tokens / total)
            losses[group.language] += group_losses(model, tokens, group, budget, options)
    if not losses:
        raise UserError("the validation split of the tokens must have at least 2 tokens of a group, got less")
    figures = {"validation_loss": float(torch.cat([one for every in losses.values() for one in every]).mean())}
    for language, found in sorted(losses.items()):
        size = tokens.manifest["splits"]["validation"][language]
        per_byte = size["tokens"] / size["bytes"]
        figures[f"bits_per_byte_{language}"] = float(torch.cat(found).mean()) / math.log(2) * per_byte
    return figures


def group_losses(model: Network, tokens: Tokens, group: Group, budget: int, options: Training) -> list[Tensor]:
    """Of the first `budget` tokens of a group, in rows of `sequence_length` or one shorter row, at least one: the loss
    of each token that counts.
    """
    length = min(options.sequence_length, group.tokens)
    count = max(1, min(budget, group.tokens) // length)
    first = tokens.ids("validation")[group.start_token : group.start_token + count * length]
    rows = torch.from_numpy(first.astype(np.int64)).view(count, length)
    places = group.start_token + np.arange(count * length)
    documents = np.searchsorted(tokens.offsets("validation"), places, side="right").reshape(count, length)
    owners = torch.from_numpy(documents - documents[:, :1]).int()  # (rows, T), counted from 0 in each row
    found, device = [], next(model.parameters()).device
    per_pass = max(1, VALIDATED_AT_ONCE // length)
    for ids, owner in zip(rows.split(per_pass), owners.split(per_pass), strict=True):
        ids, counts = ids.to(device), torch.ones(ids.shape[0], length - 1, dtype=torch.bool)
        if options.documents_apart:
            counts = owner[:, 1:] == owner[:, :-1]  # no document's first token is predicted from another document
        states = model.hidden(ids, None, owner.to(device) if options.documents_apart else None)
        states, wanted = states[:, :-1][counts.to(device)], ids[:, 1:][counts.to(device)]
        for some, targets in zip(states.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True):
            found.append(F.cross_entropy(model.lm_head(some).float(), targets, reduction="none").cpu())
    return found
