from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.artifacts import Tokens
from hasten.config import _terminate
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.training import loop
from hasten.training.data import PackedTokens
from hasten.training.loop import Fitted, fit
from hasten.training.module import LanguageModel
from hasten.training.options import Optimiser, Precision
from tests.tiny import Curves, decoder, training, write_tokens

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("loop") / "tokens").path


def fitted(
    folder: Path, scratch: Path, *, seed: int = 0, metrics: Curves | None = None, **changes: Any
) -> tuple[Weights, Fitted]:
    """12 steps of a tiny decoder on counting sequences; the weights and what the fit says of itself."""
    options, model = training(**changes), decoder(spread=0.02)
    data = PackedTokens(
        Tokens(folder),
        "train",
        batches=options.steps * options.accumulate,
        batch_size=options.batch_size,
        length=options.sequence_length,
        seed=seed,
    )
    result = fit(
        model,
        data,
        options,
        steps=options.steps,
        scratch=scratch,
        seed=seed,
        validate=lambda decoder: {"probe": float(decoder.model.norm.weight.sum())},
        metrics=metrics or Curves(),
        title="test",
    )
    return {name: value.clone() for name, value in model.state_dict().items()}, result


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Interrupting(Curves):
    """Sends this process a signal as soon as the figures of a step arrive."""

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__()
        self.step, self.signal_number = step, signal_number

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        super().metrics(values, step)
        if step == self.step and "train_loss" in values:
            os.kill(os.getpid(), self.signal_number)


@pytest.fixture
def stage_handler() -> Iterator[None]:
    """SIGTERM as in a stage: the entry wrapper's handler is in place before the fit begins."""
    before = signal.signal(signal.SIGTERM, _terminate)
    yield
    assert signal.getsignal(signal.SIGTERM) is _terminate  # the fit gave it back
    signal.signal(signal.SIGTERM, before)


def test_the_same_seed_gives_bit_identical_weights_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, _ = fitted(folder, tmp_path / "a", seed=3)
    torch.manual_seed(2)  # what happened before plays no part
    again, _ = fitted(folder, tmp_path / "b", seed=3)
    other, _ = fitted(folder, tmp_path / "c", seed=4)
    assert same(first, again)
    assert not same(first, other)


def test_training_learns_and_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    curves = Curves()
    _, result = fitted(folder, tmp_path / "scratch", metrics=curves, steps=30, validate_every_steps=20)
    loss = curves.curve("train_loss")
    assert list(loss) == list(range(2, 31, 2))
    assert loss[30] < 0.5 * loss[2]
    assert curves.curve("tokens")[30] == result.tokens == 30 * 4 * 16
    assert list(curves.curve("probe")) == [20, 30]  # every 20 steps and at the end
    assert result.validation == {"probe": curves.curve("probe")[30]}
    assert (result.steps, result.resumed_at_step) == (30, 0)
    assert {"learning_rate", "gradient_norm", "tokens_per_second"} <= curves.points[0][1].keys()
    assert curves.curve("learning_rate")[30] < curves.curve("learning_rate")[4]
    assert not (tmp_path / "scratch").exists()  # nothing to resume any more


def test_accumulating_two_half_batches_is_one_step_on_the_whole(folder: Path, tmp_path: Path) -> None:
    curves = Curves()
    plain = {"optimiser": Optimiser.adamw}  # Muon's bfloat16 arithmetic would magnify the last bits
    whole, _ = fitted(folder, tmp_path / "a", batch_size=4, **plain)
    halves, result = fitted(folder, tmp_path / "b", batch_size=2, accumulate=2, metrics=curves, **plain)
    assert result.steps == 12
    assert list(curves.curve("train_loss")) == [2, 4, 6, 8, 10, 12]
    assert not same(whole, halves)  # the sums are in another order
    assert all(torch.allclose(whole[name], halves[name], atol=1e-4) for name in whole)


def kill_in_the_middle(folder: Path, scratch: Path, changes: dict[str, Any]) -> None:
    """In a process of its own: train until the process is killed at step 10."""
    fitted(folder, scratch, metrics=Interrupting(10, signal.SIGKILL), **changes)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3, "batch_size": 2}], ids=["plain", "accumulate"])
def test_a_fit_killed_in_the_middle_is_resumed_to_the_same_weights(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])  # lightning is imported once for all children
    child = processes.Process(target=kill_in_the_middle, args=(folder, tmp_path / "killed", changes))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "last.ckpt").is_file()
    curves = Curves()
    resumed, after = fitted(folder, tmp_path / "killed", metrics=curves, **changes)
    whole, uninterrupted = fitted(folder, tmp_path / "whole", **changes)
    assert after.resumed_at_step == 8  # the last checkpoint before step 10
    assert list(curves.curve("train_loss")) == [10, 12]
    assert same(resumed, whole)
    assert (after.tokens, after.validation) == (uninterrupted.tokens, uninterrupted.validation)


@pytest.mark.usefixtures("stage_handler")
@pytest.mark.parametrize("changes", [{}, {"accumulate": 3, "batch_size": 2}], ids=["plain", "accumulate"])
def test_sigterm_saves_exits_with_143_and_is_resumed_to_the_same_weights(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fitted(folder, tmp_path / "stopped", metrics=Interrupting(6, signal.SIGTERM), **changes)
    assert stopped.value.code == 143
    resumed, after = fitted(folder, tmp_path / "stopped", **changes)
    whole, uninterrupted = fitted(folder, tmp_path / "whole", **changes)
    assert after.resumed_at_step == 6  # saved when it was stopped, not at the last checkpoint (4)
    assert same(resumed, whole)
    assert (after.tokens, after.validation) == (uninterrupted.tokens, uninterrupted.validation)


@pytest.mark.usefixtures("stage_handler")
def test_sigterm_between_the_halves_of_a_step_loses_that_step_not_its_correctness(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"accumulate": 3, "batch_size": 2}
    step = LanguageModel.training_step

    def stopping(module: LanguageModel, batch: Any, index: int) -> Tensor:
        if index == 16:  # the second of the three batches of step 6
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", stopping)
        with pytest.raises(SystemExit) as stopped:
            fitted(folder, tmp_path / "stopped", **changes)
    assert stopped.value.code == 143
    resumed, after = fitted(folder, tmp_path / "stopped", **changes)
    whole, _ = fitted(folder, tmp_path / "whole", **changes)
    assert after.resumed_at_step == 4
    assert same(resumed, whole)


@pytest.mark.usefixtures("stage_handler")
def test_sigterm_during_the_last_step_keeps_what_the_fit_found(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fitted(folder, tmp_path / "stopped", metrics=Interrupting(12, signal.SIGTERM))
    resumed, after = fitted(folder, tmp_path / "stopped")
    whole, uninterrupted = fitted(folder, tmp_path / "whole")
    assert same(resumed, whole)
    assert (after.steps, after.tokens, after.validation) == (12, uninterrupted.tokens, uninterrupted.validation)


def test_a_fit_whose_loss_becomes_nan_stops_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is nan at step 5; lower training\.learning_rate \(now 0\.01\)"):
        poisoned(folder, tmp_path / "scratch", after_step=5)


def test_a_last_step_that_ruins_the_weights_is_noticed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the weights are not finite after step 12; lower training\.learning_rate"):
        poisoned(folder, tmp_path / "scratch", after_step=12)


def poisoned(folder: Path, scratch: Path, after_step: int) -> None:
    """A fit whose optimiser writes NaN into a weight at that step."""
    clip: Callable[..., None] = LanguageModel.on_before_optimizer_step

    def poison(module: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        clip(module, optimizer)
        if module.global_step == after_step - 1:
            gradient = module.model.model.norm.weight.grad
            assert gradient is not None
            gradient.fill_(torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "on_before_optimizer_step", poison)
        fitted(folder, scratch)


def test_validation_sees_the_model_in_evaluation_mode_and_without_gradients(folder: Path, tmp_path: Path) -> None:
    seen = []

    def validate(model: Decoder) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {}

    options = training(steps=2)
    data = PackedTokens(Tokens(folder), "train", batches=2, batch_size=4, length=16, seed=0)
    model = decoder(spread=0.02)
    fit(
        model, data, options, steps=2, scratch=tmp_path / "s", seed=0, validate=validate, metrics=Curves(), title="t"
    )  # fmt: skip
    assert seen == [(False, False)]


def test_bfloat16_autocast_keeps_float32_weights_and_lands_near_float32(folder: Path, tmp_path: Path) -> None:
    full, low = Curves(), Curves()
    fitted(folder, tmp_path / "a", metrics=full)
    weights, _ = fitted(folder, tmp_path / "b", metrics=low, precision=Precision.bfloat16)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert low.curve("train_loss") != full.curve("train_loss")
    assert low.curve("train_loss")[12] == pytest.approx(full.curve("train_loss")[12], rel=0.1)


@pytest.mark.parametrize(("computed", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_automatic_precision_follows_what_the_hardware_computes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: bool, precision: str
) -> None:
    asked: dict[str, Any] = {}

    class StopError(Exception):
        pass

    def trainer(**options: Any) -> None:
        asked.update(options)
        raise StopError

    monkeypatch.setattr(loop, "computes_bfloat16", lambda accelerator: computed)
    monkeypatch.setattr(loop.lightning, "Trainer", trainer)
    with pytest.raises(StopError):
        fitted(folder, tmp_path / "s", precision=Precision.auto)
    assert asked["precision"] == precision
    assert asked["logger"] is False  # no autologging, no lightning_logs folder


def test_a_fit_runs_on_the_threads_it_is_given(folder: Path, tmp_path: Path) -> None:
    fitted(folder, tmp_path / "s", steps=1, threads=2)
    assert torch.get_num_threads() == 2
    fitted(folder, tmp_path / "t", steps=1, threads=1)
    assert torch.get_num_threads() == 1
