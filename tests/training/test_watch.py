from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from hasten.errors import UserError
from hasten.model.network import Network
from hasten.training import watch
from hasten.training.watch import Watch, score
from tests.tiny import Curves, decoder, training

Figures = dict[str, float]


class Toy(lightning.LightningModule):
    """Stands in for a `LanguageModel`: 10 tokens a pass, a loss that is 1 / (steps so far)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = decoder()
        self.tokens_seen, self.gradient_norm, self.asked = 0, 0.5, 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.tokens_seen += 10
        return self.model.lm_head.weight.square().mean()

    def mean_loss(self) -> float:
        self.asked += 1
        return 10 / self.tokens_seen

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["seen"]


def watching(
    validations: Sequence[Figures] = (), *, steps: int = 12, **changes: Any
) -> tuple[Watch, Curves, list[int]]:
    """A watch that finds those figures one after the other; what it says; the steps at which it kept the best."""
    said, kept = Curves(), []
    figures = iter(validations)
    fields = ("samples", "validate", "flops_per_token", "matmul_flops_per_second")
    given_here = {name: changes.pop(name) for name in fields if name in changes}
    made: Watch = Watch(
        training(steps=steps, **changes),
        **{
            "steps": steps,
            "validate": lambda model: next(figures, {"validation_loss": 9.0}),
            "samples": None,
            "keep_best": lambda: kept.append(made.step),
            "metrics": said,
            "title": "test",
            "flops_per_token": 600.0,
            "matmul_flops_per_second": None,
            **given_here,
        },
    )
    return made, said, kept


def fitted(made: Watch, steps: int, checkpoint: Path | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, accumulate_grad_batches=made.options.accumulate,
        callbacks=[made], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader: DataLoader[int] = DataLoader(list(range(1000)), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Toy(), loader, ckpt_path=checkpoint, weights_only=False)
    return trainer


def losses(*values: float) -> list[Figures]:
    return [{"validation_loss": value} for value in values]


def process(first: bool = True, broadcast: Callable[[Any], Any] = lambda figures: figures) -> Any:
    """Stands in for a trainer."""
    return SimpleNamespace(
        global_step=0,
        is_global_zero=first,
        should_stop=False,
        strategy=SimpleNamespace(broadcast=broadcast, root_device=torch.device("cpu")),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.125}])],
    )


def walk(made: Watch, trainer: Any, module: Toy, steps: int) -> None:
    """That many steps, without computing anything."""
    for index in range(steps):
        module.tokens_seen += 10
        trainer.global_step += 1
        made.on_train_batch_end(trainer, module, None, None, index)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A time that goes on when it is told to."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: made.now))
    yield made


def test_a_fit_has_its_curves_figures_and_samples() -> None:
    made, said, _ = watching(
        losses(3.0, 2.0), samples=lambda model: f"at {made.step}", matmul_flops_per_second=1e9, accumulate=2
    )
    trainer = fitted(made, 12)
    assert trainer.global_step == 12
    every = {"train_loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "memory_bytes", "tokens"}
    for name in every:
        assert list(said.curve(name)) == [2, 4, 6, 8, 10, 12]
    assert said.curve("tokens") == {step: 20 * step for step in (2, 4, 6, 8, 10, 12)}
    assert said.curve("train_loss")[12] == 10 / 240
    assert said.curve("validation_loss") == {6: 3.0, 12: 2.0}
    assert said.texts == {"samples/step-000006.md": "at 6", "samples/step-000012.md": "at 12"}
    for step, rate in said.curve("tokens_per_second").items():
        assert said.curve("mfu")[step] == pytest.approx(rate * 600 / 1e9)
    assert 1e7 < said.curve("memory_bytes")[12] < 1e12


def test_mfu_is_left_open_where_no_ceiling_is_known_and_texts_where_there_are_none() -> None:
    made, said, _ = watching(samples=lambda model: None)
    fitted(made, 6)
    assert said.curve("mfu") == {}
    assert said.texts == {}
    assert made.story().mfu is None


def test_the_model_is_validated_and_sampled_in_evaluation_mode_without_gradients_and_trains_on() -> None:
    seen = []

    def look(model: Network) -> Any:
        seen.append((model.training, torch.is_grad_enabled()))
        return None if len(seen) % 2 == 0 else {"validation_loss": 1.0}

    made, _, _ = watching(validate=look, samples=look)
    module, trainer = Toy(), process()
    module.train()
    made.on_train_start(trainer, module)
    walk(made, trainer, module, 6)
    assert seen == [(False, False)] * 2
    assert module.model.training


def test_the_time_of_validations_is_no_time_of_training(clock: SimpleNamespace) -> None:
    def validate(model: Network) -> Figures:
        clock.now += 1000
        return {"validation_loss": 1.0}

    made, said, _ = watching(validate=validate, validate_every_steps=2, log_every_steps=2)
    module, trainer = Toy(), process()
    made.on_train_start(trainer, module)
    for index in range(12):
        clock.now += 0.5
        module.tokens_seen += 10
        trainer.global_step += 1
        made.on_train_batch_end(trainer, module, None, None, index)
    assert set(said.curve("tokens_per_second").values()) == {20.0}
    assert made.story().tokens_per_second == 20.0


def test_early_stopping_ends_the_fit_and_keeps_the_best() -> None:
    made, _said, kept = watching(losses(3, 2, 2.5, 2, 1), steps=100, patience=2, validate_every_steps=2)
    trainer = fitted(made, 100)
    assert trainer.global_step == made.step == 8  # an equal score is no better one
    assert kept == [2, 4]
    assert (made.best, made.best_step, made.stopped) == ({"validation_loss": 2}, 4, True)
    assert made.exported == {"validation_loss": 2}
    assert made.validation == {"validation_loss": 2}
    told = made.story()
    assert (told.steps, told.planned_steps, told.validated_at_step) == (8, 100, 4)


def test_without_patience_nothing_is_kept_and_nothing_stops() -> None:
    made, _, kept = watching(losses(1, 2, 3), patience=0, validate_every_steps=4)
    assert fitted(made, 12).global_step == 12
    assert kept == []
    assert (made.exported, made.best, made.best_step) == ({"validation_loss": 3}, {"validation_loss": 1}, 4)
    assert made.story().validated_at_step == 12


def test_a_resumed_fit_counts_on_from_the_validations_before(tmp_path: Path) -> None:
    def make(*values: float) -> tuple[Watch, list[int]]:
        made, _, kept = watching(losses(*values), steps=100, patience=2, validate_every_steps=2)
        return made, kept

    first, _ = make(2, 1, 3)
    fitted(first, 6).save_checkpoint(tmp_path / "six.ckpt")
    second, kept = make(2)
    trainer = fitted(second, 100, tmp_path / "six.ckpt")
    assert (trainer.global_step, second.first_step, kept) == (8, 6, [])
    assert second.exported == {"validation_loss": 1}
    told = second.story()
    assert (told.first_loss, told.last_loss) == (10 / 20, 10 / 80)
    trainer.save_checkpoint(tmp_path / "eight.ckpt")

    over, _ = make()
    fitted(over, 8, tmp_path / "eight.ckpt")  # no step is left
    assert (over.first_step, over.story().steps, over.story().tokens, over.story().last_loss) == (8, 8, 80, 10 / 80)

    third, kept = make(0)  # it had had enough: no further step
    assert fitted(third, 100, tmp_path / "eight.ckpt").global_step == 8
    assert (kept, third.exported) == ([], {"validation_loss": 1})


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, math.nan, math.inf]), min_size=1, max_size=12))
def test_the_best_is_the_first_of_the_lowest_losses_and_what_came_after_it_is_stale(found: list[float]) -> None:
    made, _, _ = watching(patience=1)
    for step, figures in enumerate(losses(*found), 1):
        made.validation = figures
        made.judge(step)
    numbers = [value for value in found if math.isfinite(value)]
    best = found.index(min(numbers)) if numbers else None
    assert made.best == ({} if best is None else {"validation_loss": found[best]})
    assert made.best_step == (0 if best is None else best + 1)
    assert made.stale == (len(found) if best is None else len(found) - 1 - best)


def test_a_score_is_the_mean_accuracy_or_else_the_loss() -> None:
    assert score({"accuracy_a": 0.5, "accuracy_b": 1.0, "validation_loss": 7.0}) == 0.75
    assert score({"validation_loss": 7.0, "bits_per_byte_en": 1.0}) == -7.0
    assert score({"bits_per_byte_en": 1.0}) is None


def test_patience_without_anything_to_compare_is_refused() -> None:
    made, _, _ = watching([{"probe": 1.0}], patience=3)
    module, trainer = Toy(), process()
    made.on_train_start(trainer, module)
    with pytest.raises(UserError, match=r"training\.patience must be 0 where validation finds no accuracy or loss"):
        walk(made, trainer, module, 6)


def test_a_process_that_is_not_the_first_takes_part_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    called = []
    made, said, _ = watching(losses(1.0), samples=lambda model: called.append("samples") or "text")
    module, trainer = Toy(), process(first=False)
    made.on_train_start(trainer, module)
    walk(made, trainer, module, 6)
    assert module.asked == 3  # the mean over processes needs all of them
    assert called == ["samples"]
    assert (said.points, said.texts, capsys.readouterr().err) == ([], {}, "")
    assert made.validation == {"validation_loss": 1.0}


def test_processes_whose_figures_differ_in_the_last_bit_decide_as_the_first_does() -> None:
    firsts = iter(losses(1.0, 1.0, 1.0))
    made, _, kept = watching(
        losses(1.0, 1 - 1e-16, 1 - 2e-16), steps=100, patience=2, validate_every_steps=2
    )  # it alone would go on
    module, trainer = Toy(), process(first=False, broadcast=lambda own: next(firsts))
    made.on_train_start(trainer, module)
    walk(made, trainer, module, 6)
    assert trainer.should_stop
    assert kept == [2]


def test_without_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    made, _, _ = watching(losses(3.0, 2.0, 2.5), steps=60, validate_every_steps=20, patience=1, log_every_steps=2)
    module, trainer = Toy(), process()
    made.on_train_start(trainer, module)
    walk(made, trainer, module, 60)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" tokens/s ")[-1] for line in lines if "tokens/s" in line] == [
        "step 20/60",
        "step 40/60",
        "step 60/60",
    ]
    assert [line for line in lines if "validation_loss" in line] == [
        "test step 20/60  validation_loss 3.000",
        "test step 40/60  validation_loss 2.000",
        "test step 60/60  validation_loss 2.500  no better than at step 40: enough",
    ]


def test_a_story_tells_the_median_speed_and_the_first_and_last_loss(clock: SimpleNamespace) -> None:
    made, _, _ = watching(losses(2.0), steps=6, log_every_steps=1, matmul_flops_per_second=60_000.0)
    module, trainer = Toy(), process()
    made.on_train_start(trainer, module)
    for index, seconds in enumerate([10.0, 1.0, 1.0, 1.0, 1.0, 5.0]):  # the first step compiles
        clock.now += seconds
        module.tokens_seen += 10
        trainer.global_step += 1
        made.on_train_batch_end(trainer, module, None, None, index)
    told = made.story()
    assert (told.title, told.steps, told.tokens, told.intervals) == ("test", 6, 60, 6)
    assert (told.tokens_per_second, told.mfu) == (10.0, 0.1)
    assert (told.first_loss, told.last_loss) == (1.0, 10 / 60)
    assert told.memory_bytes is not None and told.memory_bytes > 1e7
    assert told.validation == {"validation_loss": 2.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu_is_what_tensors_took_at_most() -> None:
    device = torch.device("cuda:0")
    before = watch.memory_bytes(device)
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert watch.memory_bytes(device) >= max(before, held.numel())
    del held
    assert watch.memory_bytes(device) >= 2**28
