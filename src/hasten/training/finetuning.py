"""Fine-tuning: a base model and tasks to a tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hasten.artifacts import Checkpoint, replacing
from hasten.errors import UserError
from hasten.model.huggingface import load_network, network_tensors, save_checkpoint
from hasten.model.network import Network
from hasten.task.base import Item
from hasten.task.data import TaskData
from hasten.tokenizer.base import Tokenizer
from hasten.training.data import Example, TaskBatches, padded
from hasten.training.loop import Fitted, Metrics, fit
from hasten.training.options import Training
from hasten.tuning.base import Tuning

VALIDATION_ITEMS = 200  # per task; the engines measure all of them later


def finetune(
    base: Checkpoint,
    tasks: Sequence[TaskData],
    tokenizer: Tokenizer,
    tuning: Tuning,
    options: Training,
    *,
    prompt_loss_weight: float,
    max_tokens: int,
    seed: int,
    scratch: Path,
    target: Path,
    metrics: Metrics,
) -> Fitted:
    """Teach the base model its tasks and write the checkpoint to `target`."""
    model = load_network(base)
    examples = [example(item, tokenizer, max_tokens, task.path.name) for task in tasks for item in task.items("train")]
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    per_epoch = -(-len(examples) // options.batch_size)
    steps = options.steps or per_epoch * options.epochs // options.accumulate
    if steps < 1:
        raise UserError(
            f"training.accumulate must leave at least one step, got {options.accumulate} "
            f"for {per_epoch * options.epochs} batches ({len(examples)} items)"
        )
    epochs = options.epochs or -(-steps * options.accumulate // per_epoch)
    batches = TaskBatches(
        examples,
        epochs=epochs,
        batch_size=options.batch_size,
        seed=seed,
        prompt_weight=prompt_loss_weight,
        pad_id=pad_id,
    )
    held_out = {
        task.path.name: [
            example(item, tokenizer, max_tokens, task.path.name) for item in task.items("validation")[:VALIDATION_ITEMS]
        ]
        for task in tasks
    }
    tuning.attach(model)
    fitted = fit(
        model,
        batches,
        options,
        steps=steps,
        scratch=scratch,
        seed=seed,
        validate=lambda decoder: {
            f"accuracy_{name}": accuracy(decoder, items, pad_id) for name, items in held_out.items() if items
        },
        metrics=metrics,
        title="finetune",
    )
    tuning.merge(model)
    with replacing(target) as folder:
        manifest = {
            "kind": "checkpoint",
            "stage": "finetune",
            "steps": fitted.steps,
            "tokens": fitted.tokens,
            "grid": None,
            "validation": fitted.validation,
        }
        save_checkpoint(folder, base.config, network_tensors(model), base.path, manifest)
    return fitted


def example(item: Item, tokenizer: Tokenizer, max_tokens: int, task: str) -> Example:
    """An item as token ids. Raises `UserError` if it is longer than `max_tokens`."""
    prompt, completion = tokenizer.prompt_ids(item.prompt), tokenizer.completion_ids(item.expected)
    if len(prompt) + len(completion) > max_tokens:
        raise UserError(
            f"max_tokens must fit every item: item {item.id} of task {task} has "
            f"{len(prompt) + len(completion)} tokens, max_tokens is {max_tokens}"
        )
    return Example((*prompt, *completion), len(prompt))


def accuracy(model: Network, examples: Sequence[Example], pad_id: int, batch_size: int = 64) -> float:
    """Share of items whose completion greedy decoding would produce exactly.

    Teacher forcing answers that in one pass: the greedy completion is right exactly when every
    token of the expected one is the most likely after those before it.
    """
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.ids))
    right = 0
    for start in range(0, len(ordered), batch_size):
        batch = padded(ordered[start : start + batch_size], 0.0, pad_id)
        ids = batch["ids"].to(device)
        counted = batch["weights"][:, 1:].to(device) > 0  # (B, T - 1)
        states = model.hidden(ids, batch["prompt_tokens"].to(device))[:, :-1][counted]  # (N, hidden)
        wrong = torch.zeros_like(counted)
        wrong[counted] = model.lm_head(states).argmax(-1) != ids[:, 1:][counted]
        right += int((~wrong.any(dim=1)).sum())
    return right / len(ordered)
