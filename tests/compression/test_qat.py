from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hasten.artifacts import Checkpoint, Variant
from hasten.compression.base import Calibration
from hasten.compression.make import make_variant
from hasten.compression.qat import Qat
from hasten.compression.rtn import Rtn
from hasten.compression.shared.recovery import Learning
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.grid import quantised_names
from hasten.model.huggingface import load_network
from hasten.training.options import Precision
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_variant

ROWS, UNSEEN = text(24), text(12, seed=1)


def qat(**changes: Any) -> Qat:
    fields = {"steps": 40, "batch_size": 8, "learning_rate": 2e-3, "precision": Precision.float32}
    return Qat(**{**fields, "accelerator": "cpu", "threads": 1, **changes})


def baseline(tmp_path: Path, tied: bool = True) -> Variant:
    return write_variant(tmp_path / "baseline", decoder(shape(tied_head=tied), spread=0.15))


def made(parent: Checkpoint, method: Any, name: str = "q") -> Variant:
    return make_variant(method, parent, ROWS, name=name, target=parent.path.parent / name, seed=0)[0]


@torch.inference_mode()
def distance(one: Checkpoint, other: Checkpoint) -> float:
    """KL from what the second predicts to what the first does, in nats per token."""
    q, p = (load_network(model).eval()(UNSEEN.ids).log_softmax(-1) for model in (one, other))
    return float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())


@pytest.mark.parametrize("teacher", ["parent", "baseline", ""])
def test_training_on_the_grid_lowers_the_loss(tmp_path: Path, teacher: str) -> None:
    curve = made(baseline(tmp_path), qat(teacher=teacher)).manifest["curves"]["loss"]
    assert curve[-1][1] < 0.8 * curve[0][1]


@pytest.mark.parametrize("tied", [True, False])
def test_four_bits_lose_less_than_rounding_does(tmp_path: Path, tied: bool) -> None:
    parent = baseline(tmp_path, tied)
    rounded, trained = made(parent, Rtn(bits=4), "rounded"), made(parent, qat(bits=4), "trained")
    assert distance(trained, parent) < 0.8 * distance(rounded, parent)
    assert trained.manifest["grid"] == rounded.manifest["grid"]
    assert trained.tensors().keys() == rounded.tensors().keys()
    assert trained.config == rounded.config


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_stored_computes_what_training_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, group_size: int, head: bool, tied: bool
) -> None:
    seen = []

    def train(self: Qat, student: Decoder, parent: Checkpoint, rows: Calibration, seed: int) -> Learning:
        learning = train_in_fact(self, student, parent, rows, seed)
        with torch.no_grad():
            seen.append(student(UNSEEN.ids))
        return learning

    train_in_fact = Qat.train
    monkeypatch.setattr(Qat, "train", train)
    parent = baseline(tmp_path, tied)
    variant = made(parent, qat(steps=3, bits=bits, group_size=group_size, head=head))
    with torch.no_grad():
        stored = load_network(variant).eval()(UNSEEN.ids)
        assert torch.equal(stored, seen[0])
        assert not torch.equal(stored, load_network(parent).eval()(UNSEEN.ids))
    assert variant.manifest["grid"] == {"bits": bits, "group_size": group_size, "symmetric": True}
    assert len(quantised_names(variant.tensors())) == 2 * 7 + head
    assert variant.config["tie_word_embeddings"] is (tied and not head)
    assert variant.config["quantization_config"]["ignore"] == ([] if head else ["lm_head"])
    assert len(list(Eager(threads=1).load(variant, tmp_path).submit(Request(0, (5, 6, 7), 3)))) == 3


def test_a_head_off_the_grid_stays_the_embedding(tmp_path: Path) -> None:
    tensors = made(baseline(tmp_path), qat(steps=3, head=False)).tensors()
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].dtype is torch.float32


def test_a_group_size_that_does_not_divide_a_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="group_size must divide every matrix's input width, got 24 for"):
        qat(group_size=24).compress(baseline(tmp_path), ROWS, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, r"compression\.bits must be one of \[4, 8\], got 5"),
        ({"group_size": -1}, r"compression\.group_size must be 0 .whole row. or more, got -1"),
        ({"symmetric": False}, r"compression\.symmetric must be true, got False"),
    ],
)
def test_grids_no_engine_could_use_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        qat(**options)
