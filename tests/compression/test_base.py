from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.compression.base import ancestor, like_parent
from hasten.compression.depth import Depth
from hasten.compression.make import make_variant
from hasten.errors import UserError
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_checkpoint, write_variant


def test_an_ancestor_is_found_by_its_name_and_nobody_else_is(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline", decoder(shape(layers=3)))
    write_variant(tmp_path / "stranger")
    child, _ = make_variant(Depth(1), parent, text(), name="shallow", target=tmp_path / "shallow", seed=0)
    assert ancestor(child, "baseline", "compression.teacher").hash == parent.hash
    assert ancestor(child, "shallow", "compression.teacher").hash == child.hash
    words = r"compression\.teacher must be one of the parent's lineage \(baseline, shallow\), got 'stranger'"
    with pytest.raises(UserError, match=words):
        ancestor(child, "stranger", "compression.teacher")
    with pytest.raises(UserError, match=r"lineage \(none\), got 'baseline'"):
        ancestor(write_checkpoint(tmp_path / "tuned"), "baseline", "compression.teacher")


def test_changed_weights_keep_the_types_of_the_parent(tmp_path: Path) -> None:
    model = decoder()
    tensors = {name: value.bfloat16() for name, value in write_checkpoint(tmp_path / "a", model).tensors().items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    parent = write_checkpoint(tmp_path / "b", model, tensors=tensors)
    found = like_parent(model, parent)
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in parent.tensors().items()}
    assert found["model.norm.weight"].dtype is torch.float32


def test_the_same_text_has_the_same_hash_and_other_text_another() -> None:
    assert text(seed=1).hash == text(seed=1).hash
    assert (
        len({text(seed=1).hash, text(seed=2).hash, text(seed=1, documents=2).hash, text(seed=1, padding=2).hash}) == 4
    )
