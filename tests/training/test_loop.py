from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.config import _terminate
from hasten.errors import UserError
from hasten.model.network import Network
from hasten.training.checkpoints import found
from hasten.training.loop import Fitted, fit
from hasten.training.module import LanguageModel
from hasten.training.options import Optimiser, Precision
from tests.tiny import Curves, decoder, training, write_tokens
from tests.training import fits

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("loop") / "tokens").path


def fitted(folder: Path, scratch: Path, *, metrics: Curves | None = None, **changes: Any) -> tuple[Weights, Fitted]:
    """12 steps of a tiny decoder on counting sequences; the weights and what the fit says of itself."""
    model, result = fits.fitted(folder, scratch, metrics=metrics, **changes)
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
    assert result.validation == {"probe": 1.0}
    assert "30 steps, 1,920 tokens" in curves.description
    assert (result.steps, result.resumed_at_step) == (30, 0)
    assert {"learning_rate", "gradient_norm", "tokens_per_second"} <= curves.points[0][1].keys()
    assert curves.curve("learning_rate")[30] < curves.curve("learning_rate")[4]
    assert [step for step, _ in found(tmp_path / "scratch")] == [28]  # the caller removes it when its export is safe


def test_accumulating_two_half_batches_is_one_step_on_the_whole(folder: Path, tmp_path: Path) -> None:
    curves = Curves()
    plain = {"optimiser": Optimiser.adamw}  # Muon's bfloat16 arithmetic would magnify the last bits
    whole, _ = fitted(folder, tmp_path / "a", **plain)
    halves, result = fitted(folder, tmp_path / "b", accumulate=2, metrics=curves, **plain)
    assert result.steps == 12
    assert list(curves.curve("train_loss")) == [2, 4, 6, 8, 10, 12]
    assert not same(whole, halves)  # the sums are in another order
    assert all(torch.allclose(whole[name], halves[name], atol=1e-4) for name in whole)


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """A server that imports lightning once for all children; gone afterwards, as a feed's server blocks SIGTERM."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    yield context
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # the only way: Python's own tests take it too


def kill_in_the_middle(folder: Path, scratch: Path, step: int, changes: dict[str, Any]) -> None:
    """In a process of its own: train until the process is killed at a step."""
    fitted(folder, scratch, metrics=Interrupting(step, signal.SIGKILL), **changes)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, 10),
        ({"accumulate": 2}, 11),
        ({"dropout": 0.3, "steps": 70}, 66),  # an epoch is 62 steps
        ({"dropout": 0.3, "workers": 1, "mixture": {"zh": 3.0}}, 9),
        ({"compile": False, "activation_checkpointing": True, "dropout": 0.1}, 7),
    ],
    ids=["plain", "accumulate", "next epoch", "workers", "recomputing"],
)
def test_a_fit_killed_in_the_middle_is_resumed_to_the_same_weights(
    folder: Path, processes: ForkServerContext, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    changes = {"log_every_steps": 1, **changes}
    child = processes.Process(target=kill_in_the_middle, args=(folder, tmp_path / "killed", step, changes))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    last = (step - 1) // 4 * 4 if step % 4 else step - 4  # figures come before the checkpoint of the same step
    assert [at for at, _ in found(tmp_path / "killed")] == [last]
    curves = Curves()
    resumed, after = fitted(folder, tmp_path / "killed", metrics=curves, **changes)
    whole, uninterrupted = fitted(folder, tmp_path / "whole", **changes)
    assert after.resumed_at_step == last
    assert next(iter(curves.curve("train_loss"))) == last + 1
    assert same(resumed, whole)
    assert (after.tokens, after.validation) == (uninterrupted.tokens, uninterrupted.validation)


def test_a_fit_goes_on_with_other_workers_and_intervals_and_recomputing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(fits.StoppedError):
        fitted(folder, tmp_path / "stopped", stop_at=9, validate_every_steps=9, workers=1, dropout=0.2)
    changes = {"dropout": 0.2, "activation_checkpointing": True, "log_every_steps": 3}
    resumed, after = fitted(folder, tmp_path / "stopped", **changes)
    whole, _ = fitted(folder, tmp_path / "whole", dropout=0.2)
    assert after.resumed_at_step == 8
    assert same(resumed, whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_the_fit_with_one_sentence_and_keeps_the_last_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full_after_four(checkpoint: dict[str, Any], file: Any) -> None:
        if checkpoint["global_step"] > 4:
            with Path("/dev/full").open("wb", buffering=0) as full:
                save(checkpoint, full)  # what the real writer says of a full disk
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_after_four)
        with pytest.raises(UserError, match=r"step-8.ckpt could not be written: no space left .* step 4 is kept"):
            fitted(folder, tmp_path / "full")
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["step-4.ckpt"]
    resumed, after = fitted(folder, tmp_path / "full")
    whole, _ = fitted(folder, tmp_path / "whole")
    assert after.resumed_at_step == 4
    assert same(resumed, whole)


@pytest.mark.usefixtures("stage_handler")
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}], ids=["plain", "accumulate"])
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
def test_sigterm_between_the_halves_of_a_step_finishes_that_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LanguageModel.training_step

    def stopping(module: LanguageModel, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 10:  # the first of the two passes of step 6
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", stopping)
        with pytest.raises(SystemExit) as stopped:
            fitted(folder, tmp_path / "stopped", accumulate=2)
    assert stopped.value.code == 143
    resumed, after = fitted(folder, tmp_path / "stopped", accumulate=2)
    whole, _ = fitted(folder, tmp_path / "whole", accumulate=2)
    assert after.resumed_at_step == 6
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
    with pytest.raises(UserError, match=r"the loss is nan .* at step 5; lower training\.learning_rate \(now 0\.01\)"):
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

    def validate(model: Network) -> dict[str, float]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {}

    options = training(steps=2)
    fit(
        decoder(spread=0.02),
        lambda share: fits.passes(folder, options, 0, share),
        options,
        steps=2,
        scratch=tmp_path / "s",
        seed=0,
        validate=validate,
        metrics=Curves(),
        title="t",
    )
    assert seen == [(False, False)]


def test_bfloat16_autocast_keeps_float32_weights_and_lands_near_float32(folder: Path, tmp_path: Path) -> None:
    full, low = Curves(), Curves()
    fitted(folder, tmp_path / "a", metrics=full)
    weights, _ = fitted(folder, tmp_path / "b", metrics=low, precision=Precision.bfloat16)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert low.curve("train_loss") != full.curve("train_loss")
    assert low.curve("train_loss")[12] == pytest.approx(full.curve("train_loss")[12], rel=0.1)


def test_compiled_blocks_learn_the_same(folder: Path, tmp_path: Path) -> None:
    plain = {"optimiser": Optimiser.adamw, "steps": 4}
    eager, _ = fitted(folder, tmp_path / "a", **plain)
    compiled, _ = fitted(folder, tmp_path / "b", compile=True, **plain)
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[name], compiled[name], atol=1e-4) for name in eager)


def test_a_fit_runs_on_the_threads_it_is_given(folder: Path, tmp_path: Path) -> None:
    fitted(folder, tmp_path / "s", steps=1, threads=2)
    assert torch.get_num_threads() == 2
    fitted(folder, tmp_path / "t", steps=1, threads=1)
    assert torch.get_num_threads() == 1
