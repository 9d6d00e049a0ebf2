"""A tiny LSTM through what every stage calls: trained, tuned, quantised, measured, held against its baseline."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Tokens, Variant, load_checkpoint
from hasten.compression.depth import Depth
from hasten.compression.identity import Identity
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.eager import Eager
from hasten.engine.llamacpp import Llamacpp
from hasten.errors import UserError
from hasten.evaluation import continuation, worker
from hasten.evaluation.bits_per_byte import BitsPerByte, attempt
from hasten.evaluation.continuation import Continuation
from hasten.evaluation.measurement import measurement
from hasten.evaluation.trial import Job, Outcome
from hasten.model.huggingface import load_network
from hasten.scenario.qa import Qa
from hasten.task.base import Item
from hasten.task.data import TaskData, write_task
from hasten.task.jsonl import Jsonl
from hasten.tokenizer.base import load_tokenizer
from hasten.training.finetuning import finetune
from hasten.training.loop import Fitted
from hasten.training.pretraining import pretrain
from hasten.tuning.full import Full
from tests.compression.texts import text as calibration
from tests.evaluation import texts
from tests.tiny import Curves, lstm_shape, training, write_tokenizer, write_tokens

QA = Qa(prompt_tokens=8, output_tokens=4, requests=6, warmup=1, minimum_requests=5, patience_seconds=0)
MACHINE = {"id": "m", "cpu": "c", "gpu": None, "libraries": {}}
CEILINGS = {
    "read_bytes_per_second": [{"working_set_bytes": 1, "bytes_per_second": 1e11}],
    "cache_bytes_per_second": 1e11,
    "dram_bytes_per_second": 1e11,
    "matmul_flops_per_second": {"float32": 1e12},
    "validity": "valid",
    "date": "2026-11-23",
    "why": {},
}


class Quiet:
    """A line that nobody listens to."""

    def receive(self) -> Any:
        raise AssertionError("nothing more is asked")

    def answer(self, **fields: Any) -> None: ...

    def doing(self, what: str) -> None: ...


@dataclass
class Study:
    """What the stages left behind."""

    folder: Path
    base: Fitted
    tuned: Fitted
    curves: Curves

    def variant(self, name: str) -> Variant:
        found = load_checkpoint(self.folder / "variants" / name)
        assert isinstance(found, Variant)
        return found


def items(count: int, first: int) -> list[Item]:
    """`w40 wX w41` -> `w5` for even X, `w6` for odd X."""
    return [
        Item(f"i{n}", f"c{n}", "en", f"w40 w{50 + n % 40} w41", f"w{5 + n % 2}") for n in range(first, first + count)
    ]


def fitted(folder: Path, curves: Curves) -> tuple[Fitted, Fitted]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    shared: dict[str, Any] = {"seed": 0, "scratch": folder / "scratch", "metrics": curves}
    config = lstm_shape(vocab_size=0, layers=1)
    options = training(steps=150, validate_every_steps=50, documents_apart=False)
    base = pretrain(
        Tokens(folder / "tokens"), folder / "tokenizer", config, options, target=folder / "checkpoints/base", **shared
    )
    tuned = finetune(
        load_checkpoint(folder / "checkpoints/base"),
        [TaskData(folder / "tasks/parity")],
        None,
        tokenizer,
        Full(),
        training(steps=0, epochs=16, batch_size=8, validate_every_steps=80),
        prompt_loss_weight=0.0,
        rehearsal=0.0,
        max_tokens=32,
        target=folder / "checkpoints/tuned",
        **shared,
    )
    return base, tuned


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("lstm")
    write_tokens(folder / "tokens")
    tokenizer = load_tokenizer(write_tokenizer(folder / "tokenizer"))
    (folder / "tasks/parity").mkdir(parents=True)
    splits = {"train": items(80, 0), "validation": items(40, 80), "test": items(40, 120)}
    write_task(folder / "tasks/parity", Jsonl(), splits, tokenizer)
    curves = Curves()
    base, tuned = fitted(folder, curves)
    parent = load_checkpoint(folder / "checkpoints/tuned")
    for name, method in (("baseline", Identity()), ("int8", Rtn(bits=8))):
        parent, _ = make_variant(method, parent, None, name=name, target=folder / "variants" / name, seed=0)
    return Study(folder, base, tuned, curves)


@pytest.fixture(scope="module")
def measured(study: Study) -> dict[str, tuple[Job, Outcome]]:
    found = {}
    for name in ("baseline", "int8"):
        job = Job(
            trial=f"{name}-eager",
            variant=study.folder / "variants" / name,
            engine=Eager(threads=1, max_context=64),
            tasks=study.folder / "tasks",
            tokens=study.folder / "tokens",
            tokenizer=study.folder / "tokenizer",
            cache=study.folder / "cache",
            splits=("validation",),
            scenarios={"qa": QA},
            baseline=study.folder / "checkpoints/tuned",
            continuation=Continuation(2, 8, 12),
        )
        outcome = worker.measure(job, Quiet())
        assert job.baseline is not None
        rows = continuation.judge(outcome.continuations, job.baseline, job.tokenizer)
        found[name] = job, replace(outcome, continuations=rows)
    return found


def test_it_learns_its_text_and_its_task(study: Study) -> None:
    loss = study.curves.curve("validation_loss")
    assert loss[150] < 0.6 * loss[50]
    assert study.tuned.validation["accuracy_parity"] > 0.9
    checkpoint = load_checkpoint(study.folder / "checkpoints/tuned")
    assert checkpoint.config["model_type"] == "hasten_lstm"
    assert checkpoint.manifest["stage"] == "finetune"


def test_the_same_seed_gives_the_same_bytes(study: Study, tmp_path: Path) -> None:
    for name in ("tokens", "tokenizer", "tasks"):
        (tmp_path / name).symlink_to(study.folder / name)
    fitted(tmp_path, Curves())
    for name in ("checkpoints/base", "checkpoints/tuned"):
        assert load_checkpoint(tmp_path / name).hash == load_checkpoint(study.folder / name).hash


def test_held_out_text_is_scored(study: Study, tmp_path: Path) -> None:
    words = load_tokenizer(study.folder / "tokenizer")
    documents = [("en", " ".join(f"w{n % 40 + 3}" for n in range(start, start + 90))) for start in (0, 7, 11)]
    texts.write_tokens(tmp_path / "tokens", words, documents)
    found = {
        name: attempt(study.variant(name), tmp_path / "tokens", study.folder / "tokenizer", BitsPerByte())
        for name in ("baseline", "int8")
    }
    values = {name: entry["languages"]["en"]["value"] for name, entry in found.items()}
    assert values["int8"] == pytest.approx(values["baseline"], rel=0.05)


def test_a_trial_is_measured_like_any_other(study: Study, measured: dict[str, tuple[Job, Outcome]]) -> None:
    job, outcome = measured["baseline"]
    found = measurement(job, outcome, machine=MACHINE, ceilings=CEILINGS)
    assert (found["status"], found["native"], found["kernel"]) == ("ok", True, "float32")
    assert found["quality"]["parity"]["validation"]["accuracy"] > 0.9
    assert found["speed"]["qa"]["latency_seconds_p50"] > 0
    assert found["kv_bytes_per_position"] == 0
    assert found["continuation"]["diverged_share"] == 0  # the baseline against itself
    for phase in ("decode", "prefill"):
        assert found["roofline"]["qa"][phase]["flops"] > 0
        assert found["roofline"]["qa"][phase]["bytes"] > 0
    assert json.dumps(found, allow_nan=False)


def test_a_quantised_lstm_answers_and_never_competes_on_speed(measured: dict[str, tuple[Job, Outcome]]) -> None:
    job, outcome = measured["int8"]
    found = measurement(job, outcome, machine=MACHINE, ceilings=CEILINGS)
    assert (found["status"], found["native"], found["kernel"]) == ("ok", False, "float32 (dequantised)")
    assert found["quality"]["parity"]["validation"]["accuracy"] > 0.9
    assert found["artifact_bytes"] < 0.6 * measurement(*measured["baseline"], machine=MACHINE)["artifact_bytes"]


def test_its_integers_are_those_of_the_tuned_weights(study: Study) -> None:
    tuned = load_network(load_checkpoint(study.folder / "checkpoints/tuned")).state_dict()
    for name, weight in load_network(study.variant("int8")).state_dict().items():
        assert torch.allclose(weight, tuned[name], atol=float(tuned[name].abs().max()) / 127)


def test_an_engine_that_cannot_run_it_refuses_with_the_reason(study: Study) -> None:
    support = Llamacpp().supports(study.variant("baseline"))
    assert not support
    assert "hasten_lstm" in str(support.reason)


def test_depth_pruning_refuses_it_with_the_reason(study: Study) -> None:
    with pytest.raises(UserError, match="hasten_lstm"):
        Depth(drop=1).compress(study.variant("baseline"), calibration(2, 16), 0)
