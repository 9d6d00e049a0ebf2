from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Checkpoint, load_checkpoint
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.task.base import Item
from hasten.tokenizer.base import Tokenizer, load_tokenizer
from hasten.training import finetuning
from hasten.training.data import Example
from hasten.training.finetuning import accuracy, example, finetune
from hasten.training.loop import Fitted
from hasten.tuning.full import Full
from tests.fakes import FakeTaskData
from tests.tiny import Curves, decoder, training, write_checkpoint, write_tokenizer, write_variant


def items(count: int, first: int = 0) -> list[Item]:
    """`w40 wX w41` -> `w5` for even X, `w6` for odd X: learnable from the embedding alone."""
    return [
        Item(f"i{n}", f"c{n}", "en", f"w40 w{50 + n % 40} w41", f"w{5 + n % 2}") for n in range(first, first + count)
    ]


def task(train: int = 80, validation: int = 40) -> FakeTaskData:
    splits = {"train": items(train), "validation": items(validation), "test": []}
    return FakeTaskData(Path("tasks/parity"), splits)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("finetuning") / "base", decoder(spread=0.05))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("finetuning") / "tokenizer"))


def tuned(
    base: Checkpoint, target: Path, *, tasks: list[Any] | None = None, metrics: Curves | None = None, **changes: Any
) -> Fitted:
    fields: dict[str, Any] = {"steps": 0, "epochs": 3, "batch_size": 8, "validate_every_steps": 10, **changes}
    return finetune(
        base,
        tasks or [task()],
        load_tokenizer(base.path),
        Full(),
        training(**fields),
        prompt_loss_weight=0.0,
        max_tokens=32,
        seed=0,
        scratch=target.with_name("scratch"),
        target=target,
        metrics=metrics or Curves(),
    )


def test_fine_tuning_teaches_the_task_and_saves_a_checkpoint_with_its_tokenizer(
    base: Checkpoint, tmp_path: Path
) -> None:
    curves = Curves()
    result = tuned(base, tmp_path / "tuned", metrics=curves, epochs=8, validate_every_steps=30)
    right = curves.curve("accuracy_parity")
    assert list(right) == [30, 60, 80]
    assert right[80] > 0.9
    assert result.validation == {"accuracy_parity": right[80]}
    checkpoint = load_checkpoint(tmp_path / "tuned")
    assert checkpoint.config == base.config
    assert (checkpoint.manifest["stage"], checkpoint.manifest["steps"]) == ("finetune", 80)
    session = Eager(threads=1).load(checkpoint, tmp_path)  # type: ignore[arg-type]
    reader = load_tokenizer(checkpoint.path)  # it travelled along
    answers = [
        [token.id for token in session.submit(Request(0, reader.prompt_ids(item.prompt), 4, frozenset([1])))]
        for item in items(20)
    ]
    assert sum(answer == [5 + n % 2, 1] for n, answer in enumerate(answers)) >= 18


def test_the_same_seed_gives_the_same_artifact_bytes(base: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tuned(base, tmp_path / name / "tuned", epochs=1)
    assert load_checkpoint(tmp_path / "a/tuned").hash == load_checkpoint(tmp_path / "b/tuned").hash


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"epochs": 2}, 20),  # 80 items in batches of 8
        ({"epochs": 3, "accumulate": 2}, 15),
        ({"steps": 7, "epochs": 0}, 7),
        ({"steps": 13, "epochs": 0, "accumulate": 2}, 13),
    ],
)
def test_epochs_or_steps_decide_the_length(
    base: Checkpoint, tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    assert tuned(base, tmp_path / "tuned", **changes).steps == steps


def test_too_few_items_for_one_accumulated_step_are_refused_not_silently_untrained(
    base: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"training\.accumulate"):
        tuned(base, tmp_path / "tuned", tasks=[task(train=5)], epochs=1, accumulate=2)
    assert not (tmp_path / "tuned").exists()


def test_every_task_is_validated_on_a_bounded_number_of_its_items(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(finetuning, "accuracy", lambda model, items, pad: float(asked.append(len(items)) or 0.5))
    second = task(validation=250)
    second.path = Path("tasks/second")
    third = task(validation=0)
    third.path = Path("tasks/third")
    result = tuned(base, tmp_path / "tuned", tasks=[task(), second, third], steps=1, epochs=0)
    assert result.validation.keys() == {"accuracy_parity", "accuracy_second"}  # no items, no figure
    assert asked == [40, finetuning.VALIDATION_ITEMS]


def test_an_item_is_its_prompt_after_bos_and_its_completion_before_eos(tokenizer: Tokenizer) -> None:
    made = example(Item("a", "a", "en", "w7 w8", "w9"), tokenizer, 5, "t")
    assert made == Example((0, 7, 8, 9, 1), 3)


def test_an_item_that_is_too_long_is_refused_by_name_and_length(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="item i9 of task parity has 5 tokens, max_tokens is 4"):
        example(Item("i9", "c", "en", "w7 w8", "w9"), tokenizer, 4, "parity")


@settings(max_examples=10)
@given(seed=st.integers(0, 30), batch_size=st.sampled_from([1, 3, 64]))
def test_teacher_forced_accuracy_is_what_greedy_decoding_gets_right(
    tmp_path_factory: pytest.TempPathFactory, seed: int, batch_size: int
) -> None:
    model = decoder(seed=seed, spread=0.1)
    variant = write_variant(tmp_path_factory.mktemp("accuracy") / "v", model)
    session = Eager(threads=1).load(variant, variant.path)
    generator = torch.Generator().manual_seed(seed)
    examples, right = [], 0
    for number in range(12):
        prompt = tuple(torch.randint(3, 100, (1 + number % 5,), generator=generator).tolist())
        greedy = tuple(token.id for token in session.submit(Request(number, prompt, 2)))
        wrong = number % 3 == 0  # some expect another last token than the one that greedy decoding picks
        examples.append(Example((*prompt, greedy[0], (greedy[1] + wrong) % 100), len(prompt)))
        right += not wrong
    with torch.no_grad():
        assert accuracy(model, examples, pad_id=2, batch_size=batch_size) == right / 12
