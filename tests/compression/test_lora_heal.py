from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Checkpoint, Variant
from hasten.compression.base import Calibration
from hasten.compression.depth import Depth
from hasten.compression.lora_heal import LoraHeal
from hasten.compression.make import make_variant
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.huggingface import load_network
from hasten.training.options import Optimiser, Precision
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_variant


def counting(rows: int = 24, length: int = 16, first: int = 0) -> Calibration:
    """Every token is its predecessor's successor: what a network can learn."""
    made = text(rows, length)
    made.ids = 3 + (first + torch.arange(rows)[:, None] * 5 + torch.arange(length)) % 97
    return made


def heal(**changes: Any) -> LoraHeal:
    fields = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2, "precision": Precision.float32}
    return LoraHeal(**{**fields, "accelerator": "cpu", "threads": 1, **changes})


def pruned(tmp_path: Path) -> Variant:
    baseline = write_variant(tmp_path / "baseline", decoder(shape(layers=3), spread=0.1))
    return make_variant(Depth(1), baseline, counting(), name="shallow", target=tmp_path / "shallow", seed=0)[0]


def healed(parent: Checkpoint, **changes: Any) -> Variant:
    target = parent.path.parent / "healed"
    return make_variant(heal(**changes), parent, counting(), name="healed", target=target, seed=0)[0]


@torch.inference_mode()
def loss(checkpoint: Checkpoint) -> float:
    rows = counting(first=2)
    logits = load_network(checkpoint).eval()(rows.ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, rows.ids[:, 1:].flatten()))


@pytest.mark.parametrize("optimiser", list(Optimiser))
def test_a_pruned_network_learns_from_text(tmp_path: Path, optimiser: Optimiser) -> None:
    shallow = pruned(tmp_path)
    variant = healed(shallow, optimiser=optimiser)
    curve = variant.manifest["curves"]["loss"]
    assert curve[-1][1] < 0.8 * curve[0][1]
    assert loss(variant) < 0.8 * loss(shallow)


def test_what_is_learned_about_the_targets_has_the_rank_and_nothing_else_moves(tmp_path: Path) -> None:
    shallow = pruned(tmp_path)
    variant = healed(shallow, rank=3, targets=["v_proj", "down_proj"])
    before, after = shallow.tensors(), variant.tensors()
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[-2] for name in moved} == {"v_proj", "down_proj"}
    for name in moved:
        assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-4) == 3


def test_a_teacher_can_take_the_place_of_the_text(tmp_path: Path) -> None:
    shallow = pruned(tmp_path)
    assert healed(shallow).hash != healed(shallow, teacher="baseline").hash
    unmoved = healed(shallow, teacher="parent", steps=3).tensors()  # an equal teaches nothing
    assert all(torch.equal(value, unmoved[name]) for name, value in shallow.tensors().items())


def test_alpha_says_how_much_of_it_counts(tmp_path: Path) -> None:
    shallow = pruned(tmp_path)
    assert len({healed(shallow, steps=3, alpha=alpha).hash for alpha in (1.0, 16.0)}) == 2


def test_a_healed_network_is_a_plain_one_that_generates(tmp_path: Path) -> None:
    shallow = pruned(tmp_path)
    variant = healed(shallow, steps=3, precision=Precision.bfloat16)
    assert variant.config == shallow.config
    assert variant.lineage == ["baseline", "shallow", "healed"]
    assert len(list(Eager(threads=1).load(variant, tmp_path).submit(Request(0, (5, 6), 4)))) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, r"compression\.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, r"compression\.alpha must be above 0 and finite, got 0\.0"),
        ({"targets": []}, r"compression\.targets must name at least one of \['q_proj', .*got none"),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        heal(**options)


def test_a_target_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compression\.targets must be one of \['down_proj', .*got 'lm_head'"):
        heal(targets=["lm_head"]).compress(write_variant(tmp_path / "baseline"), text(), 0)
