"""What methods hold while they work, in a process of their own: no more than the parent and a layer."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from hasten import peak
from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration
from hasten.compression.make import make_variant
from hasten.config import discover
from hasten.model.config import ModelConfig
from hasten.model.decoder import Decoder
from tests.tiny import write_checkpoint

SHAPE = ModelConfig(
    layers=4, hidden_size=512, heads=8, kv_heads=8, feed_forward_size=1024, vocab_size=16384, context=64, tied_head=True
)
HEAD_BYTES = 4 * SHAPE.vocab_size * SHAPE.hidden_size  # the largest layer that is treated
BLOCK_BYTES = 4 * (4 * SHAPE.hidden_size**2 + 3 * SHAPE.hidden_size * SHAPE.feed_forward_size)
GRAM_BYTES = 8 * SHAPE.feed_forward_size**2  # X^T X of the widest matrix
OTHER_BYTES = 2**24  # states, activations, what the allocator keeps


def held(parents: tuple[Checkpoint, Checkpoint], name: str, target: Path) -> int:
    """In a fresh process: the most bytes that making a variant of the second parent took, once one of the first, which
    is tiny, had loaded all that the method needs.
    """
    method, found = discover("compression")[name](), 0
    for parent in parents:
        vocabulary = parent.config["vocab_size"]
        ids = torch.randint(3, vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))
        text = Calibration(ids, torch.zeros_like(ids).int(), torch.ones_like(ids).float())
        assert peak.reset_peak()
        before = peak.peak_bytes()[0]
        needed = None if method.needs == "nothing" else text
        _, cost = make_variant(method, parent, needed, name="v", target=target, seed=0)
        assert before is not None
        found = int(cost["build_peak_memory_bytes"]) - before
    return found


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """A tiny one, and one of 76 MB, of which the embedding, which is the head as well, takes 34 and a block 10."""
    model, folder = Decoder(SHAPE), tmp_path_factory.mktemp("memory")
    model.initialise(seed=0)
    return write_checkpoint(folder / "tiny"), write_checkpoint(folder / "parent", model)


@pytest.mark.skipif(not os.access(peak.CLEAR_REFS, os.W_OK), reason="this system does not let a peak be reset")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("rtn", HEAD_BYTES),
        ("fp8", HEAD_BYTES),
        ("magnitude", BLOCK_BYTES),
        ("gptq", HEAD_BYTES + 3 * GRAM_BYTES),
        ("sparsegpt", GRAM_BYTES),  # of three: the embedding is given back meanwhile
        ("mixed", HEAD_BYTES),
    ],
)
def test_a_method_holds_its_parent_and_a_layer(
    parents: tuple[Checkpoint, Checkpoint], tmp_path: Path, name: str, more: int
) -> None:
    assert 75e6 < parents[1].weight_bytes < 76e6
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        found = apart.submit(held, parents, name, tmp_path / "v").result()
    assert found < 1.05 * (parents[1].weight_bytes + more) + OTHER_BYTES
