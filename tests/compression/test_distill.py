from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hasten.artifacts import Checkpoint, Variant
from hasten.compression.base import Calibration
from hasten.compression.depth import Depth
from hasten.compression.distill import Distill
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.distillation import matching, watched
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from hasten.training.options import Precision
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_checkpoint, write_variant

ROWS, UNSEEN = text(24), text(12, seed=1)


def distil(**changes: Any) -> Distill:
    fields = {"steps": 40, "batch_size": 8, "learning_rate": 5e-3, "precision": Precision.float32}
    return Distill(**{**fields, "accelerator": "cpu", "threads": 1, **changes})


def pruned(tmp_path: Path, drop: int = 1) -> tuple[Variant, Variant]:
    """A baseline of 4 blocks and what is left of it."""
    baseline = write_variant(tmp_path / "baseline", decoder(shape(layers=4), spread=0.15))
    shallow, _ = make_variant(Depth(drop), baseline, ROWS, name="shallow", target=tmp_path / "shallow", seed=0)
    return baseline, shallow


def healed(parent: Checkpoint, name: str = "healed", **changes: Any) -> Variant:
    return make_variant(distil(**changes), parent, ROWS, name=name, target=parent.path.parent / name, seed=0)[0]


def network(checkpoint: Checkpoint) -> Decoder:
    model = load_network(checkpoint).eval()
    assert isinstance(model, Decoder)
    return model


@torch.inference_mode()
def distance(one: Checkpoint, other: Checkpoint, rows: Calibration = UNSEEN) -> float:
    """KL from what the second predicts to what the first does, in nats per token."""
    q, p = (network(model)(rows.ids).log_softmax(-1) for model in (one, other))
    return float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())


def test_a_pruned_network_comes_closer_to_its_teacher_on_text_that_it_did_not_see(tmp_path: Path) -> None:
    baseline, shallow = pruned(tmp_path)
    variant = healed(shallow)
    curve = variant.manifest["curves"]["loss"]
    assert curve[-1][1] < 0.5 * curve[0][1]
    assert distance(variant, baseline) < 0.8 * distance(shallow, baseline)
    assert variant.config == shallow.config
    assert variant.manifest["grid"] is None


def test_who_already_is_the_teacher_learns_nothing(tmp_path: Path) -> None:
    baseline = write_variant(tmp_path / "baseline", decoder(shape(layers=3)))
    tensors = healed(baseline, steps=5, hidden_weight=1.0, temperature=2.0).tensors()
    assert all(torch.equal(value, tensors[name]) for name, value in baseline.tensors().items())


def test_the_weight_of_states_brings_blocks_closer_to_those_they_come_from(tmp_path: Path) -> None:
    baseline, shallow = pruned(tmp_path)
    pairs = matching(shallow, baseline)
    missed = []
    for hidden_weight in (0.0, 20.0):
        models = [network(one) for one in (healed(shallow, hidden_weight=hidden_weight), baseline)]
        with torch.inference_mode(), watched(models[0], range(3)) as ours, watched(models[1], range(4)) as theirs:
            for model in models:
                model(UNSEEN.ids)
        missed.append(sum(float((ours[i] - theirs[j]).square().mean()) for i, j in pairs))
    assert missed[1] < 0.8 * missed[0]


def test_the_hard_weight_teaches_the_tokens_themselves(tmp_path: Path) -> None:
    _, shallow = pruned(tmp_path)
    losses = []
    for hard_weight in (0.0, 5.0):
        model = network(healed(shallow, hard_weight=hard_weight))
        with torch.inference_mode():
            logits = model(ROWS.ids)[:, :-1].flatten(0, 1)
        losses.append(float(F.cross_entropy(logits, ROWS.ids[:, 1:].flatten())))
    assert losses[1] < 0.8 * losses[0]


def test_prune_heal_quantise_is_a_chain_that_generates(tmp_path: Path) -> None:
    _, shallow = pruned(tmp_path, drop=2)
    variant = healed(shallow, steps=3)
    child, _ = make_variant(Rtn(bits=4), variant, None, name="int4", target=tmp_path / "int4", seed=0)
    assert child.lineage == ["baseline", "shallow", "healed", "int4"]
    for one in (variant, child):
        assert len(list(Eager(threads=1).load(one, tmp_path).submit(Request(0, (5, 6), 4)))) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_stored_in_the_types_of_the_parent(tmp_path: Path, tied: bool) -> None:
    model = decoder(shape(tied_head=tied))
    tensors = {name: value.bfloat16() for name, value in write_checkpoint(tmp_path / "a", model).tensors().items()}
    write_variant(tmp_path / "baseline", decoder(seed=1))
    parent = write_checkpoint(
        tmp_path / "b", model, kind="variant", tensors=tensors, name="b", method="own", lineage=["baseline", "b"]
    )
    variant = healed(parent, steps=2)
    assert {name: value.dtype for name, value in variant.tensors().items()} == dict.fromkeys(tensors, torch.bfloat16)
    assert variant.config == parent.config
    assert not torch.equal(variant.tensors()["model.norm.weight"], tensors["model.norm.weight"])


def test_the_parent_is_not_changed(tmp_path: Path) -> None:
    _, shallow = pruned(tmp_path)
    before = shallow.hash
    healed(shallow, steps=2)
    assert Variant(shallow.path).hash == before


def test_a_teacher_must_be_named() -> None:
    with pytest.raises(UserError, match=r"compression\.teacher must name one of the parent's lineage, got ''"):
        distil(teacher="")
