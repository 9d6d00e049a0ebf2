from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hasten.model.cost import Cost
from hasten.model.decoder import Cache, Decoder
from tests.tiny import shape

SHAPES: list[dict[str, Any]] = [
    {},
    {"tied_head": False},
    {"kv_heads": 1, "layers": 3},
    {"kv_heads": 4, "head_size": 16, "feed_forward_size": 50},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_parameters_are_those_of_the_decoder(changes: dict[str, Any]) -> None:
    config = shape(**changes)
    model, cost = Decoder(config), Cost(config)
    counted = {name: value.numel() for name, value in model.named_parameters()}  # a tied head once
    assert cost.parameters == sum(counted.values())
    assert cost.block_matrix_parameters == sum(n for name, n in counted.items() if ".0." in name and "norm" not in name)
    assert cost.norm_parameters == sum(n for name, n in counted.items() if "norm" in name)
    per_token = sum(value.numel() for name, value in model.state_dict().items() if "embed" not in name)
    assert cost.parameters_per_token == per_token


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize("changes", SHAPES)
def test_prefill_flops_are_within_a_percent_of_what_torch_counts(changes: dict[str, Any], tokens: int) -> None:
    config = shape(**changes)
    counter = FlopCounterMode(display=False)
    # The mathematical kernel shows its two matrix products to the counter; the fused one hides them.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        Decoder(config)(torch.zeros(1, tokens, dtype=torch.int64))
    assert Cost(config).prefill_flops(tokens) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("changes", SHAPES)
def test_flops_with_a_cache_are_within_a_percent_of_what_torch_counts(changes: dict[str, Any]) -> None:
    """A prompt whose last position alone gets logits, then one token that attends to 17 positions."""
    config = shape(**changes)
    model, cache = Decoder(config), Cache(config, 1, 64, torch.float32)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        for tokens, expected in ((16, Cost(config).prefill_flops(16, logits=1)), (1, Cost(config).decode_flops(17))):
            counter = FlopCounterMode(display=False)
            with counter:
                model(torch.zeros(1, tokens, dtype=torch.int64), cache)
            assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_training_flops_are_within_a_percent_of_what_torch_counts() -> None:
    config, counter = shape(), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        Decoder(config)(torch.zeros(3, 32, dtype=torch.int64)).sum().backward()
    assert Cost(config).training_flops(3 * 32, 32) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_kv_bytes_are_those_of_an_allocated_cache() -> None:
    for changes in SHAPES:
        config = shape(**changes)
        assert Cost(config).kv_bytes(40) == Cache(config, 1, 40, torch.float16).bytes
        assert Cost(config).kv_bytes(40, 4) == Cache(config, 1, 40, torch.float32).bytes


def test_weight_bytes_follow_the_format_of_blocks_and_head_while_norms_stay_float32() -> None:
    cost = Cost(shape())
    assert cost.weight_bytes_per_token() == 4 * cost.parameters_per_token
    blocks, head, norms = 2 * cost.block_matrix_parameters, 100 * 32, 5 * 32
    assert cost.weight_bytes_per_token(0.5625, 2.0) == round(blocks * 0.5625 + head * 2 + norms * 4)
