"""The loop both fits share: Lightning drives, callbacks watch and save, a kill costs at most one checkpoint interval.

With several processes, each runs the whole entry point; Lightning starts the others, unless torchrun or Slurm did. They
take part in everything here, and after it the first alone has the weights and goes on to export them.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from safetensors.torch import load_file, save_file

from hasten.artifacts import Json, replacing
from hasten.errors import TogetherError
from hasten.hardware import keep_freed_memory
from hasten.model.cost import cost_of
from hasten.model.network import Network
from hasten.training.checkpoints import Checkpoints, any_of, latest, together
from hasten.training.module import Batches, LanguageModel
from hasten.training.options import Training
from hasten.training.placement import matmul_rate, place, refuse_shape
from hasten.training.review import costs, summary
from hasten.training.sharding import gathered, local
from hasten.training.watch import Metrics, Samples, Validate, Watch


@dataclass
class Fitted:
    """What a fit did. The last validation's figures (the best one's where `patience` is set) and the training's size;
    seconds are this run's. exports: whether this process has the weights.
    """

    steps: int
    tokens: int
    seconds: float
    resumed_at_step: int
    validation: dict[str, float]
    exports: bool = True

    def figures(self) -> dict[str, float]:
        """For the run's table."""
        return {"steps": self.steps, "trained_tokens": self.tokens, "fit_seconds": self.seconds, **self.validation}


def fit(
    model: Network,
    batches: Batches,
    options: Training,
    *,
    steps: int,
    scratch: Path,
    seed: int,
    validate: Validate,
    metrics: Metrics,
    title: str,
    samples: Samples | None = None,
    mean_length: int = 0,
    predicted: float = 1.0,
    ceilings: Json | None = None,
) -> Fitted:
    """Train `model` in place for `steps` optimiser steps.

    batches: what a process with a given share sees, pass by pass. mean_length: tokens of a typical sequence, for
    counting operations (0: `sequence_length`), predicted: the share of tokens that go through the head, likewise.
    ceilings: this machine's, if they are known. Raises `UserError` on a loss that is not finite; exits with 143 on
    SIGTERM after saving. In processes other than the first the model may be left without weights. `scratch` stays: the
    caller removes it when what was learnt is safe.
    """
    refuse_shape(model.config, options)
    placement = place(options)
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="lightning|torch.distributed")
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(placement.threads)
    lightning.seed_everything(seed, verbose=False)
    model.set_dropout(options.dropout)
    model.recompute = options.activation_checkpointing
    start = latest(scratch, placement.sharded)
    model.train()
    trained = model
    if placement.sharded:  # the weights move into a twin; the first process gets them back in the end
        trained = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        model.to("meta")
    module = LanguageModel(trained, batches, options, placement, steps=steps, seed=seed)
    best, keeper = scratch / "best.safetensors", Checkpoints(options, scratch, placement.sharded)

    def keep_best() -> None:
        state = gathered(trained) if placement.sharded else trained.state_dict()
        names = [name for name, weight in trained.named_parameters() if weight.requires_grad]

        def write() -> None:
            if trainer.is_global_zero:
                with replacing(best) as path:
                    save_file({name: state[name].contiguous() for name in names}, path)

        together(trainer, write, best)

    watch = Watch(
        options,
        steps=steps,
        validate=validate,
        samples=None if placement.sharded else samples,
        keep_best=keep_best,
        metrics=metrics,
        title=title,
        flops_per_token=flops_per_token(trained, mean_length or options.sequence_length, predicted),
        matmul_flops_per_second=matmul_rate(ceilings, placement),
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        callbacks=[watch, keeper],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=options.log_every_steps,
        **placement.trainer_options(),
    )
    begun = time.perf_counter()
    leave_signals_alone(trainer)
    with keeper.listening():
        trainer.fit(module, ckpt_path=start, weights_only=False)
    seconds = time.perf_counter() - begun
    refuse_infinite_weights(trainer, trained, options)
    metrics.metrics(costs(model.config, ceilings))
    metrics.describe(summary(watch.story(), model.config, ceilings))
    if placement.sharded and (state := gathered(trained)):  # it comes together in the first process
        model.load_state_dict(state, assign=True)
        model.tie()
    model.recompute = False
    if trainer.is_global_zero:
        model.cpu()
        if options.patience and best.is_file():
            model.load_state_dict(load_file(best), strict=False)
            model.tie()
    return Fitted(
        trainer.global_step, module.tokens_seen, seconds, watch.first_step, watch.exported, trainer.is_global_zero
    )


def flops_per_token(model: Network, length: int, predicted: float) -> float:
    """Of training on sequences of that length: a third each for the forward pass, the gradients of activations, and the
    gradients of those weights that train. The head works on what is predicted alone.
    """
    cost, weights = cost_of(model.config), list(model.parameters())
    share = sum(w.numel() for w in weights if w.requires_grad) / sum(w.numel() for w in weights)
    spared = 3 * 2 * cost.head.weights * (1 - predicted)
    return (cost.training_flops(length, length) / length - spared) * (2 + share) / 3


def refuse_infinite_weights(trainer: lightning.Trainer, model: Network, options: Training) -> None:
    """Raises `TogetherError` in all processes if a weight of any is NaN or infinite."""
    if any_of(trainer, any(not torch.isfinite(local(weight)).all() for weight in model.parameters())):
        raise TogetherError(
            f"the weights are not finite after step {trainer.global_step}; lower training.learning_rate "
            f"(now {options.learning_rate})"
        )


def leave_signals_alone(trainer: lightning.Trainer) -> None:
    """Keep Lightning from handling SIGTERM: with several processes it waits for the others within the handler, and at
    the end it exits with 0.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
