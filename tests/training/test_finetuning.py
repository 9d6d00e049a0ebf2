from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import Checkpoint, Tokens, load_checkpoint
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from hasten.task.base import Item
from hasten.tokenizer.base import Tokenizer, load_tokenizer
from hasten.training import finetuning
from hasten.training.data import Example
from hasten.training.finetuning import accuracy, example, finetune, refuse_unfit
from hasten.training.loop import Fitted
from hasten.training.options import Strategy
from hasten.training.pretraining import held_out, pretrain
from hasten.tuning.base import Tuning
from hasten.tuning.full import Full
from hasten.tuning.lora import Lora
from tests.fakes import FakeTaskData
from tests.tiny import (
    Curves,
    decoder,
    lstm_shape,
    shape,
    training,
    write_checkpoint,
    write_tokenizer,
    write_tokens,
    write_variant,
)


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
    base: Checkpoint,
    target: Path,
    *,
    tasks: list[Any] | None = None,
    tokens: Tokens | None = None,
    tuning: Tuning | None = None,
    rehearsal: float = 0.0,
    metrics: Curves | None = None,
    **changes: Any,
) -> Fitted:
    fields: dict[str, Any] = {"steps": 0, "epochs": 3, "batch_size": 8, "validate_every_steps": 10, **changes}
    return finetune(
        base,
        tasks or [task()],
        tokens,
        load_tokenizer(base.path),
        tuning or Full(),
        training(**fields),
        prompt_loss_weight=0.0,
        rehearsal=rehearsal,
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
    assert not (tmp_path / "scratch").exists()  # nothing to resume any more
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
        ({"epochs": 3, "accumulate": 2}, 30),  # the passes of a step share its batch
        ({"steps": 7, "epochs": 0}, 7),
        ({"steps": 13, "epochs": 0, "accumulate": 2}, 13),
    ],
)
def test_epochs_or_steps_decide_the_length(
    base: Checkpoint, tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    assert tuned(base, tmp_path / "tuned", **changes).steps == steps


def test_lora_teaches_the_task_and_leaves_a_plain_checkpoint(base: Checkpoint, tmp_path: Path) -> None:
    curves = Curves()
    tuned(base, tmp_path / "tuned", tuning=Lora(rank=4), metrics=curves, epochs=8, validate_every_steps=80)
    assert curves.curve("accuracy_parity")[80] > 0.8
    before, after = base.tensors(), load_checkpoint(tmp_path / "tuned").tensors()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {name for name in before if name.endswith("_proj.weight")}


def test_packed_items_teach_what_padded_ones_teach(base: Checkpoint, tmp_path: Path) -> None:
    curves = Curves()
    tuned(base, tmp_path / "tuned", metrics=curves, packing=True, batch_size=4, epochs=20, validate_every_steps=100)
    assert max(curves.curve("accuracy_parity").values()) > 0.9


def test_rehearsing_text_keeps_what_fine_tuning_alone_unlearns(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    write_tokenizer(tmp_path / "tokenizer")
    options = training(steps=60, validate_every_steps=60)
    pretrain(
        tokens, tmp_path / "tokenizer", shape(), options,
        seed=0, scratch=tmp_path / "s", target=tmp_path / "base", metrics=Curves(),
    )  # fmt: skip
    base, losses = load_checkpoint(tmp_path / "base"), {}
    for rehearsal in (0.0, 0.5):
        target = tmp_path / f"tuned-{rehearsal}"
        tuned(base, target, tokens=tokens, rehearsal=rehearsal, epochs=4, sequence_length=16)
        with torch.no_grad():
            losses[rehearsal] = held_out(load_network(load_checkpoint(target)), tokens, options)["validation_loss"]
    assert losses[0.5] < 0.5 * losses[0.0]


def test_early_stopping_exports_the_best_weights_and_says_so(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, norms = iter([0.5, 0.7, 0.6, 0.7, 0.9]), []

    def scripted(model: Decoder, items: Any, pad: int) -> float:
        norms.append(model.model.norm.weight.detach().clone())
        return next(scores)

    monkeypatch.setattr(finetuning, "accuracy", scripted)
    curves = Curves()
    result = tuned(
        base, tmp_path / "tuned", metrics=curves, steps=50, epochs=0, validate_every_steps=3, patience=2,
        checkpoint_every_steps=5,
    )  # fmt: skip
    assert result.steps == 12  # 0.6 and 0.7 are no better than 0.7
    assert result.validation == {"accuracy_parity": 0.7}
    assert torch.equal(load_checkpoint(tmp_path / "tuned").tensors()["model.norm.weight"], norms[1])
    assert "stopped before step 50" in curves.description


@pytest.mark.parametrize(
    ("config", "tuning", "changes", "sentence"),
    [
        (
            shape(),
            Full(),
            {"packing": True, "sequence_length": 65},
            r"training.sequence_length must be .* \(64\), got 65",
        ),
        (lstm_shape(), Full(), {"packing": True}, "training.packing must be false for an LSTM"),
        (
            shape(),
            Lora(),
            {"strategy": Strategy.tensor_parallel, "processes": 2},
            r"training.strategy must be one of \['single', 'ddp', 'fsdp'\] with tuning=lora, got 'tensor_parallel'",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    config: Any, tuning: Tuning, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        refuse_unfit(config, tuning, training(**changes))


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
    assert made == Example((0, 7, 8, 9, 1), 3, "t", "en")


def test_an_item_that_is_too_long_is_refused_by_name_and_length(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="item i9 of task parity has 5 tokens, the smaller of both is 4"):
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
