from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.cost import cost_of
from hasten.model.decoder import Decoder
from hasten.model.factored import Factored
from hasten.model.huggingface import load_network, network_tensors
from hasten.model.layout import Format
from hasten.model.low_rank_config import LowRankConfig, matrix_sizes
from hasten.model.shape import build, read_shape, write_shape
from tests.tiny import GEMMA, decoder, shape, write_checkpoint

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
RANKS = {QUERY: 8, DOWN: 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "llama, biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True}, "gemma": GEMMA,
}  # fmt: skip


def thin(config: ModelConfig, ranks: dict[str, int]) -> LowRankConfig:
    return LowRankConfig(**{one.name: getattr(config, one.name) for one in fields(config)}, ranks=ranks)


def split(model: Decoder, ranks: dict[str, int]) -> Decoder:
    """The same network, those matrices in two by their singular vectors."""
    state = model.state_dict()
    for name, rank in ranks.items():
        left, values, right = torch.linalg.svd(state.pop(f"{name}.weight"), full_matrices=False)
        state[f"{name}.in_proj.weight"] = right[:rank]
        state[f"{name}.out_proj.weight"] = left[:, :rank] * values[:rank]
        if f"{name}.bias" in state:
            state[f"{name}.out_proj.bias"] = state.pop(f"{name}.bias")
    made = build(thin(model.config, ranks))
    made.load_state_dict(state)
    assert isinstance(made, Decoder)
    return made.eval()


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_two_matrices_of_full_rank_say_what_one_did(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = decoder(shape(**changes))
    full = {name: min(size) for name, size in matrix_sizes(model.config).items()}
    saved = write_checkpoint(tmp_path / "thin", split(model, full))
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    loaded = load_network(saved)
    assert isinstance(loaded.get_submodule(QUERY), Factored)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_the_cost_is_that_of_the_thin_matrices(changes: dict[str, Any]) -> None:
    config = thin(shape(**changes), RANKS)
    model, cost = build(config), cost_of(config)
    tensors = network_tensors(model)
    assert cost.parameters == sum(value.numel() for value in tensors.values())
    assert cost.weight_bytes_per_token(Format.floats(2)) == 2 * cost.parameters  # tied: nothing is left out
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    saved = cost_of(shape(**changes)).prefill_flops(8) - cost.prefill_flops(8)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        build(shape(**changes))(torch.zeros(1, 8, dtype=torch.int64))
    assert saved == whole.get_total_flops() - counter.get_total_flops()
    assert saved == 2 * 8 * (32 * 32 - 8 * 64 + 32 * 64 - 16 * 96)


def test_its_shape_survives_config_json_which_no_library_takes_for_its_familys() -> None:
    from transformers import AutoConfig

    config = thin(shape(**GEMMA), RANKS)
    written = write_shape(config, bos_id=0, eos_id=1, pad_id=2)
    found = read_shape(written)
    assert isinstance(found, LowRankConfig) and found.ranks == RANKS
    assert write_shape(found, bos_id=0, eos_id=1, pad_id=2) == written
    with pytest.raises(ValueError, match="hasten_low_rank"):
        AutoConfig.for_model(**written)


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ({"model.layers.2.self_attn.q_proj": 4}, "must name matrices of the blocks, got 'model.layers.2.self_attn"),
        ({"lm_head": 4}, "must name matrices of the blocks, got 'lm_head'"),
        ({QUERY: 0}, "must be 1 to 32 for model.layers.0.self_attn.q_proj, got 0"),
        ({QUERY: 33}, "must be 1 to 32 for"),
        ({QUERY: 2.5}, "got 2.5"),
        ({QUERY: True}, "got True"),
        ({}, "ranks must be an object with a rank for each factored matrix, got {}"),
        (7, "got 7"),
    ],
)
def test_ranks_that_cannot_be_are_refused(ranks: Any, reason: str) -> None:
    written = write_shape(thin(shape(), RANKS), bos_id=0, eos_id=1, pad_id=2)
    with pytest.raises(UserError, match=re.escape(reason)):
        read_shape({**written, "ranks": ranks})


def test_a_family_that_is_not_covered_is_refused() -> None:
    written = write_shape(thin(shape(), RANKS), bos_id=0, eos_id=1, pad_id=2)
    with pytest.raises(UserError, match="model_type must be one of llama"):
        read_shape({**written, "base_model_type": "gpt2"})
