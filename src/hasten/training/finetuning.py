"""Fine-tuning: a base model and tasks to a tuned model.

Only what the model writes is learnt (the prompt's weight is 0 unless asked for). Text that it was trained on can be
mixed in, so that learning to answer does not undo learning to write.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch.utils.data import Dataset

from hasten.artifacts import Checkpoint, Json, Tokens, replacing
from hasten.errors import UserError
from hasten.model.huggingface import load_network, network_tensors, save_checkpoint
from hasten.model.network import Network
from hasten.model.shape import Shape
from hasten.task.base import Item
from hasten.task.data import TaskData
from hasten.tokenizer.base import Tokenizer
from hasten.training.data import (
    WHOLE,
    Batch,
    Example,
    PackedExamples,
    PackedTokens,
    Rehearsed,
    Share,
    TaskBatches,
    padded,
)
from hasten.training.loop import Fitted, fit
from hasten.training.options import Training
from hasten.training.placement import place, refuse_shape
from hasten.training.review import samples
from hasten.training.watch import Metrics
from hasten.tuning.base import Tuning

VALIDATION_ITEMS = 200  # per task; the engines measure all of them later


def refuse_unfit(config: Shape, tuning: Tuning, options: Training) -> None:
    """Raises `UserError` for options that a network of that shape cannot be fine-tuned with."""
    if options.packing and options.sequence_length > config.context:
        raise UserError(
            f"training.sequence_length must be at most the model's context ({config.context}), "
            f"got {options.sequence_length}"
        )
    if options.packing and not options.documents_apart:
        raise UserError("training.documents_apart must be true where items are packed, got false")
    tuning.refuse_strategy(options.strategy.name)
    refuse_shape(config, options)


def finetune(
    base: Checkpoint,
    tasks: Sequence[TaskData],
    tokens: Tokens | None,
    tokenizer: Tokenizer,
    tuning: Tuning,
    options: Training,
    *,
    prompt_loss_weight: float,
    rehearsal: float,
    max_tokens: int,
    seed: int,
    scratch: Path,
    target: Path,
    metrics: Metrics,
    ceilings: Json | None = None,
) -> Fitted:
    """Teach the base model its tasks and write the checkpoint to `target`.

    tokens: text to rehearse, a row for every four items, which has `rehearsal` of the weight of every step's loss;
    needed where that is above 0.
    """
    model = load_network(base)
    refuse_unfit(model.config, tuning, options)
    max_tokens = min(max_tokens, model.config.context)
    examples = [example(item, tokenizer, max_tokens, task.path.name) for task in tasks for item in task.items("train")]
    pad_id = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id

    batches_of = partial(PackedExamples, length=options.sequence_length) if options.packing else TaskBatches

    def questions(share: Share) -> TaskBatches:
        return batches_of(
            examples,
            steps=options.steps,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=seed,
            prompt_weight=prompt_loss_weight,
            pad_id=pad_id,
            mixture=options.mixture,
            encodes_prompt=not model.predicts_prompt,
            share=share,
        )

    steps, placement = questions(WHOLE).steps, place(options)

    def text(share: Share) -> PackedTokens:
        assert tokens is not None, "rehearsal needs tokens"
        return PackedTokens(
            tokens,
            "train",
            steps=steps,
            batch_size=text_rows(options),
            even_shares=False,
            length=min(options.sequence_length, model.config.context),
            seed=seed,
            apart=model.separates_documents,
            encodes_prompt=not model.predicts_prompt,
            share=share,
        )

    def batches(share: Share) -> Dataset[Batch]:
        return Rehearsed(questions(share), text(share), rehearsal) if rehearsal else questions(share)

    held_out = {task.path.name: task.items("validation")[:VALIDATION_ITEMS] for task in tasks}
    checked = {
        name: [example(item, tokenizer, max_tokens, name) for item in items]
        for name, items in held_out.items()
        if items
    }
    prompts = [tokenizer.prompt_ids(items[0].prompt) for items in held_out.values() if items][: options.sample_prompts]
    tuning.attach(model, seed=seed, low_precision=placement.low and not placement.sharded)
    fitted = fit(
        model,
        batches,
        options,
        steps=steps,
        scratch=scratch,
        seed=seed,
        validate=lambda network: {
            f"accuracy_{name}": accuracy(network, items, pad_id) for name, items in checked.items()
        },
        metrics=metrics,
        title="finetune",
        samples=lambda network: samples(network, prompts, tokenizer, options.sample_tokens),
        mean_length=round(fmean(len(one.ids) for one in examples)),
        predicted=predicted_share(examples, text_rows(options) / options.batch_size if rehearsal else 0.0),
        ceilings=ceilings,
    )
    if not fitted.exports:
        return fitted
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
    shutil.rmtree(scratch, ignore_errors=True)
    return fitted


def text_rows(options: Training) -> int:
    """Rows of text in a step that rehearses."""
    return max(1, options.batch_size // 4)


def predicted_share(examples: Sequence[Example], text: float) -> float:
    """Which share of a step's tokens goes through the head: those of completions, and all of the text.

    text: rows of text for each row of a task, of the same length.
    """
    written = sum(len(one.ids) - one.prompt_tokens for one in examples) / sum(len(one.ids) for one in examples)
    return (written + text) / (1 + text)


def example(item: Item, tokenizer: Tokenizer, max_tokens: int, task: str) -> Example:
    """An item as token ids. Raises `UserError` if it is longer than `max_tokens`."""
    prompt, completion = tokenizer.prompt_ids(item.prompt), tokenizer.completion_ids(item.expected)
    if len(prompt) + len(completion) > max_tokens:
        raise UserError(
            f"max_tokens and the model's context must fit every item: item {item.id} of task {task} has "
            f"{len(prompt) + len(completion)} tokens, the smaller of both is {max_tokens}"
        )
    return Example((*prompt, *completion), len(prompt), task, item.language)


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
