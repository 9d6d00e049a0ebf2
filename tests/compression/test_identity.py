from __future__ import annotations

from pathlib import Path

import torch

from hasten.compression.identity import Identity
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.model.grid import Grid
from tests.tiny import write_checkpoint, write_variant


def test_the_baseline_is_its_parent_bit_for_bit(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "tuned")
    variant, _ = make_variant(Identity(), parent, None, name="baseline", target=tmp_path / "baseline", seed=0)
    ours, theirs = variant.tensors(), parent.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert variant.config == parent.config
    assert variant.manifest["grid"] is None


def test_a_quantised_parent_stays_on_its_grid(tmp_path: Path) -> None:
    parent, _ = make_variant(
        Rtn(bits=4, group_size=16), write_variant(tmp_path / "b"), None, name="q", target=tmp_path / "q", seed=0
    )
    made = Identity().compress(parent, None, 0)
    assert made.grid == Grid(4, 16)
    assert made.config["quantization_config"] == parent.config["quantization_config"]
