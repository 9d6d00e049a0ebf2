from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hasten.errors import UserError
from hasten.training.module import LanguageModel, draws_of
from hasten.training.options import Training
from hasten.training.placement import place
from tests.tiny import decoder, training


def language_model(options: Training) -> LanguageModel:
    return LanguageModel(decoder(), lambda share: [], options, place(options), steps=1, seed=0)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(("limit", "norm_after"), [(0.5, 0.5), (0.0, None)])
def test_gradients_are_clipped_to_the_limit_and_the_norm_before_is_kept(limit: float, norm_after: float | None) -> None:
    module = language_model(training(gradient_clip=limit))
    for parameter in module.trainable():
        parameter.grad = torch.full_like(parameter, 0.3)
    before = math.sqrt(sum(float(p.grad.square().sum()) for p in module.trainable() if p.grad is not None))
    module.on_before_optimizer_step(module.configure_optimizers()["optimizer"])
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in module.trainable() if p.grad is not None))
    assert module.gradient_norm == pytest.approx(before, rel=1e-4)
    assert after == pytest.approx(before if norm_after is None else norm_after, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_one_sentence_with_the_step_and_the_learning_rate() -> None:
    module = language_model(training(learning_rate=0.25))
    module.trainer = type("Trainer", (), {"global_step": 7})()  # type: ignore[assignment]
    module._losses = [torch.tensor(math.nan)]
    for parameter in module.trainable():
        parameter.grad = torch.full_like(parameter, math.nan)
    sentence = r"the loss is nan and the gradient nan at step 7; lower training\.learning_rate \(now 0\.25\)"
    with pytest.raises(UserError, match=sentence):
        module.on_before_optimizer_step(module.configure_optimizers()["optimizer"])


def test_what_a_pass_draws_depends_on_seed_pass_and_share_alone() -> None:
    seeds = {draws_of(seed, index, rank) for seed in range(3) for index in range(50) for rank in range(2)}
    assert len(seeds) == 300
    assert draws_of(1, 2, 3) == draws_of(1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "either steps or epochs above 0, got steps=0 and epochs=0"),
        ({"steps": 5, "epochs": 1}, "either steps or epochs above 0, got steps=5 and epochs=1"),
        ({"steps": -5, "epochs": 1}, "got steps=-5 and epochs=1"),
        ({"steps": 5, "epochs": -1}, "got steps=5 and epochs=-1"),
        ({"batch_size": 0}, "training.batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "training.accumulate must be at least 1, got 0"),
        ({"validate_every_steps": 0}, "training.validate_every_steps must be at least 1"),
        ({"sequence_length": 1}, "training.sequence_length must be at least 2, got 1"),
        ({"learning_rate": 0.0}, "training.learning_rate must lie between 0 and 10, got 0.0"),
        ({"learning_rate": math.nan}, "training.learning_rate must lie between 0 and 10, got nan"),
        ({"warmup_fraction": 1.0}, "training.warmup_fraction must be at least 0 and below 1, got 1.0"),
        ({"final_learning_rate_fraction": -0.1}, "training.final_learning_rate_fraction"),
        ({"gradient_clip": -1.0}, "training.gradient_clip"),
        ({"weight_decay": -1.0}, "training.weight_decay"),
        ({"accelerator": "tpu"}, "training.accelerator must be auto, cpu or cuda, got 'tpu'"),
        ({"threads": -1}, "training.threads"),
        ({"beta1": 1.0}, "training.beta1"),
        ({"beta2": -0.1}, "training.beta2"),
        ({"validation_tokens": 0}, "training.validation_tokens"),
        ({"dropout": 1.0}, "training.dropout must be at least 0 and below 1, got 1.0"),
        ({"patience": -1}, "training.patience must be 0 or more, got -1"),
        ({"workers": -1}, "training.workers must be 0 or more, got -1"),
        ({"nodes": 0}, "training.nodes must be at least 1, got 0"),
        ({"mixture": {"zh": -1.0}}, "training.mixture.zh must be 0 or more and finite, got -1.0"),
        ({"mixture": {"zh": math.inf}}, "training.mixture.zh must be 0 or more and finite, got inf"),
    ],
)
def test_training_options_that_cannot_work_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        training(**changes)
    assert words in str(error.value)
