from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hasten.artifacts import Checkpoint, load_checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.compression.depth import Depth
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.calibration import Calibrate, draw
from hasten.errors import UserError
from hasten.model.grid import Grid
from tests.tiny import write_checkpoint, write_tokens, write_variant


@dataclass
class Spoiling(Compressor):
    """Writes a bad value into one weight."""

    value: float = float("nan")
    tensor: str = "model.norm.weight"

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        tensors = parent.tensors()
        tensors[self.tensor].view(-1)[-1] = self.value
        return Compressed(parent.config, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_method_that_makes_nan_fails_and_leaves_what_was_there(tmp_path: Path, value: float) -> None:
    parent = write_variant(tmp_path / "baseline")
    target = tmp_path / "variants" / "v"
    make_variant(Rtn(), parent, None, name="v", target=target, seed=0)
    before = load_checkpoint(target).hash
    with pytest.raises(UserError, match=r"made NaN or infinite values in model\.norm\.weight of variant v"):
        make_variant(Spoiling(value), parent, None, name="v", target=target, seed=0)
    assert load_checkpoint(target).hash == before
    assert [path.name for path in target.parent.iterdir()] == ["v"]


def test_nan_in_a_parent_does_not_disappear_in_quantisation(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "clean").tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 7] = torch.nan
    parent = write_checkpoint(tmp_path / "parent", tensors=tensors)
    with pytest.raises(UserError, match=r"made NaN or infinite values in model\.layers\.0\.mlp\.up_proj"):
        make_variant(Rtn(), parent, None, name="v", target=tmp_path / "v", seed=0)


def test_a_variant_says_how_it_was_made(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "tuned")
    write_tokens(tmp_path / "tokens")
    text = draw(tmp_path, Calibrate(2, 8), seed=0)
    variant, cost = make_variant(Depth(drop=1), parent, text, name="shallow", target=tmp_path / "shallow", seed=0)
    facts = dict(variant.manifest)
    assert facts.pop("notes").keys() == {"dropped", "influence"}
    assert facts == {
        "schema": 1,
        "kind": "variant",
        "name": "shallow",
        "method": "depth",
        "options": {"drop": 1, "criterion": "influence"},
        "lineage": ["shallow"],  # a checkpoint is no variant: the lineage begins here
        "parent": parent.hash,
        "grid": None,
        "calibration": "2 x 8 tokens of text, of the training split",
        "calibration_sha256": text.hash,
        "curves": {},
    }
    assert cost["build_tokens"] == 16
    assert cost["build_seconds"] > 0
    assert cost["build_peak_memory_bytes"] > 2**20


def test_the_lineage_is_the_parents_and_the_new_name(tmp_path: Path) -> None:
    child, cost = make_variant(
        Rtn(bits=4), write_variant(tmp_path / "baseline"), None, name="int4", target=tmp_path / "x", seed=0
    )
    assert child.lineage == ["baseline", "int4"]
    assert child.manifest["options"] == {
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "head": True,
        "scale": "nearest",
    }
    assert child.manifest["grid"] == Grid(4, 32).describe()
    assert child.manifest["calibration"] is None
    assert cost["build_tokens"] == 0


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    made = [make_variant(Rtn(), parent, None, name="v", target=tmp_path / n, seed=0)[0] for n in ("a", "b")]
    assert made[0].hash == made[1].hash
    assert "seconds" not in json.dumps(made[0].manifest)
