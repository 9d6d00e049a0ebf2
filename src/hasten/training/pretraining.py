"""Pre-training: tokens to a base model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from hasten.artifacts import Tokens, replacing
from hasten.errors import UserError
from hasten.model.huggingface import network_tensors, save_checkpoint
from hasten.model.network import Network
from hasten.model.shape import Shape, build, write_shape
from hasten.tokenizer.base import load_tokenizer
from hasten.training.data import PackedTokens
from hasten.training.loop import Fitted, Metrics, fit
from hasten.training.loss import token_losses
from hasten.training.options import Training


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
) -> Fitted:
    """Train a network from scratch on `tokens` and write the checkpoint to `target`.

    tokenizer: its folder, copied into the checkpoint.
    """
    reader = load_tokenizer(tokenizer)
    config.vocab_size = config.vocab_size or reader.vocab_size
    if config.vocab_size < reader.vocab_size:
        raise UserError(
            f"model.vocab_size must be 0 or at least the tokenizer's {reader.vocab_size}, got {config.vocab_size}"
        )
    per_step = options.batch_size * options.accumulate * options.sequence_length
    steps = options.steps or math.ceil(options.epochs * len(tokens.ids("train")) / per_step)
    batches = PackedTokens(
        tokens,
        "train",
        batches=steps * options.accumulate,
        batch_size=options.batch_size,
        length=options.sequence_length,
        seed=seed,
    )
    model = build(config)
    model.initialise(seed)
    fitted = fit(
        model,
        batches,
        options,
        steps=steps,
        scratch=scratch,
        seed=seed,
        validate=lambda decoder: held_out(decoder, tokens, options),
        metrics=metrics,
        title="pretrain",
    )
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
    return fitted


def held_out(model: Network, tokens: Tokens, options: Training) -> dict[str, float]:
    """Loss in nats per token on the validation split, and bits per byte for each language.

    Bits per byte compares models with different tokenizers: nats per token / ln 2 * tokens per byte.
    """
    ids, offsets, languages = tokens.ids("validation"), tokens.offsets("validation"), tokens.languages("validation")
    length = min(options.sequence_length, len(ids))
    sequences = max(1, min(len(ids), options.validation_tokens) // length)
    owners = languages[np.searchsorted(offsets[1:], np.arange(sequences * length), side="right")]
    rows = torch.from_numpy(ids[: sequences * length].astype(np.int64)).view(sequences, length)
    device = next(model.parameters()).device
    losses = torch.cat(
        [token_losses(model(chunk.to(device)), chunk.to(device)).cpu() for chunk in rows.split(options.batch_size)]
    )
    counted = torch.ones_like(losses, dtype=torch.bool)
    counted[:, 0] = False
    figures = {"validation_loss": float(losses[counted].mean())}
    owner = torch.from_numpy(owners.astype(np.int64)).view(sequences, length)
    for index, language in enumerate(tokens.manifest["languages"]):
        chosen = counted & (owner == index)
        if chosen.any():
            size = tokens.manifest["splits"]["validation"][language]
            per_byte = size["tokens"] / size["bytes"]
            figures[f"bits_per_byte_{language}"] = float(losses[chosen].mean()) / math.log(2) * per_byte
    return figures
