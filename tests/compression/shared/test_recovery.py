from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import load_checkpoint, write_json
from hasten.compression.base import Calibration
from hasten.compression.distill import Distill
from hasten.compression.lora_heal import LoraHeal
from hasten.compression.make import make_variant
from hasten.compression.qat import Qat
from hasten.compression.rtn import Rtn
from hasten.compression.shared.recovery import Learned, Recovery
from hasten.errors import UserError
from hasten.model.lstm_config import LstmConfig, to_json
from hasten.training.options import Optimiser, Precision
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_checkpoint, write_variant

METHODS: list[type[Recovery]] = [Distill, LoraHeal, Qat]


def brief(method: type[Recovery], **changes: Any) -> Recovery:
    """A few float32 steps on one thread."""
    fields = {"steps": 12, "batch_size": 4, "precision": Precision.float32, "accelerator": "cpu", "threads": 1}
    return method(**{**fields, **changes})


def drawn(rows: Calibration, seed: int, **changes: Any) -> list[list[int]]:
    """Which rows each step sees."""
    where = {tuple(ids.tolist()): number for number, ids in enumerate(rows.ids)}
    return [[where[tuple(ids.tolist())] for ids in one["ids"]] for one in brief(Distill, **changes).batches(rows, seed)]


def test_rows_come_up_once_before_any_comes_again_in_an_order_of_the_seed() -> None:
    rows = text(10)
    first = drawn(rows, 0, steps=5)
    flat = [row for step in first for row in step]
    assert [len(step) for step in first] == [4] * 5
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert drawn(rows, 0, steps=5) == first != drawn(rows, 1, steps=5)


def test_what_is_learned_is_every_token_of_a_document_or_what_counts() -> None:
    rows = text(4, 12, documents=2, padding=3)
    rows.weights[:, 1:4] = 0
    for learned in Learned:
        one = next(brief(Distill, learned=learned).batches(rows, 0))
        for documents, weights in zip(one["documents"].tolist(), one["weights"].tolist(), strict=True):
            follows = [a == b >= 0 for a, b in pairwise(documents)]
            if learned is Learned.counted:
                follows[:3] = [False] * 3
            assert weights == [0.0, *map(float, follows)]
        assert one["total"] == one["weights"].sum()


def test_a_step_in_which_nothing_counts_is_worth_nothing() -> None:
    rows = text(4)
    rows.weights[:] = 0
    assert next(brief(Distill, learned=Learned.counted).batches(rows, 0))["total"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_it_cost_and_how_the_loss_went(tmp_path: Path, method: type[Recovery]) -> None:
    parent, rows = write_variant(tmp_path / "baseline"), text(8, 16, padding=4)
    variant, cost = make_variant(brief(method), parent, rows, name="v", target=tmp_path / "v", seed=0)
    assert cost["build_steps"] == 12
    assert cost["build_tokens"] == 12 * 4 * 16 - sum(
        int((one["documents"] < 0).sum()) for one in brief(method).batches(rows, 0)
    )
    curve = variant.manifest["curves"]["loss"]
    assert [step for step, _ in curve] == [1, 10, 12]
    assert all(value == round(value, 6) for _, value in curve)
    assert variant.manifest["options"]["precision"] == "float32"
    assert variant.manifest["options"]["learned"] == "counted"


@pytest.mark.parametrize(
    ("method", "teacher"),
    [(method, teacher) for method in METHODS for teacher in ("", "parent", "baseline") if teacher or method != Distill],
)
def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(
    tmp_path: Path, method: type[Recovery], teacher: str
) -> None:
    parent = write_variant(tmp_path / "baseline")
    options = {"steps": 3, "teacher": teacher, "hard_weight": 0.5}
    hashes = [
        make_variant(brief(method, **options), parent, text(), name="v", target=tmp_path / name, seed=seed)[0].hash
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_ends_it_in_one_sentence(tmp_path: Path, method: type[Recovery]) -> None:
    model = decoder()
    with torch.no_grad():
        model.model.layers[0].get_parameter("mlp.down_proj.weight").mul_(1e38)
    parent = write_variant(tmp_path / "baseline", model)
    words = rf"{brief(method).name}: the loss is nan and .* at step 1; lower compression\.learning_rate \(now 0\.0"
    with pytest.raises(UserError, match=words):
        brief(method, hard_weight=1.0).compress(parent, text(), 0)


@pytest.mark.parametrize("method", METHODS)
def test_it_needs_rows_and_a_float_decoder(tmp_path: Path, method: type[Recovery]) -> None:
    parent, heal = write_variant(tmp_path / "baseline"), brief(method)
    assert heal.needs == "training"
    with pytest.raises(UserError, match=f"{heal.name} needs calibration text, got none"):
        heal.compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match=rf"{heal.name} needs a float parent, got .* which is quantised; quantise last"):
        heal.compress(quantised, text(), 0)
    write_json(parent.path / "config.json", to_json(LstmConfig(vocab_size=100), bos_id=0, eos_id=1, pad_id=2))
    with pytest.raises(UserError, match=rf"{heal.name} is for decoders \(llama, .*\), got model_type 'hasten_lstm'"):
        heal.compress(load_checkpoint(parent.path), text(), 0)


@pytest.mark.parametrize("method", METHODS)
def test_only_an_ancestor_may_teach_and_only_with_the_same_vocabulary(tmp_path: Path, method: type[Recovery]) -> None:
    parent = write_variant(tmp_path / "baseline")
    write_variant(tmp_path / "stranger")
    with pytest.raises(UserError, match=r"compression\.teacher must be one of .* \(baseline\), got 'stranger'"):
        brief(method, teacher="stranger").compress(parent, text(), 0)
    cut = decoder(shape(vocab_size=90))
    child = write_checkpoint(
        tmp_path / "cut", cut, kind="variant", name="cut", method="own", lineage=["baseline", "cut"], notes={}
    )
    rows = text()
    rows.ids.clamp_(max=89)
    with pytest.raises(UserError, match=r"must have the parent's vocabulary of 90 tokens, got one of 100"):
        brief(method, teacher="baseline").compress(child, rows, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, r"compression\.steps must be at least 1, got 0"),
        ({"batch_size": 0}, r"compression\.batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, r"compression\.learning_rate must lie between 0 and 10, got 0\.0"),
        ({"warmup_fraction": 1.0}, r"compression\.warmup_fraction must be at least 0 and below 1, got 1\.0"),
        ({"weight_decay": -1.0}, r"compression\.weight_decay must be 0 or more and finite, got -1\.0"),
        ({"gradient_clip": float("nan")}, r"compression\.gradient_clip must be 0 or more and finite, got nan"),
        ({"temperature": 0.0}, r"compression\.temperature must be above 0 and finite, got 0\.0"),
        ({"temperature": float("nan")}, r"compression\.temperature must be above 0 and finite, got nan"),
        ({"hidden_weight": -0.1}, r"compression\.hidden_weight must be 0 or more and finite, got -0\.1"),
        ({"hard_weight": float("inf")}, r"compression\.hard_weight must be 0 or more and finite, got inf"),
        ({"accelerator": "tpu"}, r"compression\.accelerator must be auto, cpu or cuda, got 'tpu'"),
        ({"threads": -1}, r"compression\.threads must be 0 \(all cores\) to 4096, got -1"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    method: type[Recovery], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        method(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compression\.accelerator must be cpu or auto where torch finds no CUDA"):
        brief(Distill, accelerator="cuda").compress(write_variant(tmp_path / "baseline"), text(), 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": Optimiser.adamw},
        {"learning_rate": 5e-3},
        {"warmup_fraction": 0.5},
        {"weight_decay": 0.5},
        {"gradient_clip": 1e-3},
        {"precision": Precision.bfloat16},
        {"batch_size": 3},
        {"temperature": 3.0},
        {"hidden_weight": 1.0},
        {"hard_weight": 1.0},
        {"learned": Learned.all},
    ],
)
def test_every_option_reaches_the_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_variant(tmp_path / "baseline", decoder(seed=1))
    parent = write_checkpoint(
        tmp_path / "child", decoder(seed=2), kind="variant", name="child", method="own", lineage=["baseline", "child"],
        notes={},
    )  # fmt: skip
    rows = text()
    rows.weights[:, ::2] = 0
    made = [brief(Distill, **{"steps": 4, **one}).compress(parent, rows, 0) for one in ({}, changes)]
    weights = [one.tensors["model.layers.1.mlp.up_proj.weight"] for one in made]
    assert not torch.equal(*weights)
