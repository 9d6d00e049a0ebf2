from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.model.cost import cost_of
from hasten.model.grid import Grid
from hasten.model.layout import Format
from hasten.model.lstm import Lstm
from hasten.model.lstm_config import LstmConfig
from hasten.model.lstm_cost import LstmCost
from tests.tiny import lstm, lstm_shape, write_variant

SHAPES: list[dict[str, Any]] = [
    {},
    {"layers": 1, "tied_head": False},
    {"layers": 3, "embedding_size": 48, "tied_head": False},
]


def counted(model: Lstm, *calls: Any) -> int:
    """FLOPs that torch counts. In float64 the steps show their matrix products; the fused kernel hides them."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(*calls)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("changes", SHAPES)
def test_parameters_are_those_of_the_network(changes: dict[str, Any]) -> None:
    config = lstm_shape(**changes)
    cost, sizes = cost_of(config), {name: value.numel() for name, value in Lstm(config).named_parameters()}
    assert isinstance(cost, LstmCost)
    assert cost.parameters == sum(sizes.values())  # a tied head once
    decoding = {name: size for name, size in sizes.items() if ".encoder." not in name and "embed" not in name}
    if config.tied_head:
        expected = sum(decoding.values()) + sizes["model.embed_tokens.weight"]
    else:
        expected = sum(decoding.values()) + config.input_width
    assert cost.parameters_per_token == expected


@settings(max_examples=20, deadline=None)
@given(layers=st.integers(1, 4), hidden=st.integers(1, 50), embedding=st.integers(1, 50), vocabulary=st.integers(1, 99))
def test_parameters_are_exact_for_any_shape(layers: int, hidden: int, embedding: int, vocabulary: int) -> None:
    sizes = {"layers": layers, "hidden_size": hidden, "embedding_size": embedding, "vocab_size": vocabulary}
    config = lstm_shape(**sizes, tied_head=False)
    with torch.device("meta"):
        model = Lstm(config)
    assert cost_of(config).parameters == sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("tokens", [1, 16])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any], tokens: int) -> None:
    config = lstm_shape(**changes)
    model, cost = Lstm(config).double(), cost_of(config)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.inference_mode():
        assert counted(model, ids) == pytest.approx(cost.prefill_flops(tokens), rel=0.01)
        state = model.new_state(1, 64, torch.float64)
        assert counted(model, ids, state) == pytest.approx(cost.prefill_flops(tokens, logits=1), rel=0.01)
        for position in (tokens + 1, tokens + 2):
            assert counted(model, ids[:, :1], state) == pytest.approx(cost.decode_flops(position), rel=0.01)


def test_training_flops_are_within_a_percent_of_what_torch_counts() -> None:
    config, counter = lstm_shape(layers=1), FlopCounterMode(display=False)
    model = Lstm(config).double()
    with counter:
        model(torch.zeros(3, 64, dtype=torch.int64)).sum().backward()
    assert cost_of(config).training_flops(3 * 64, 64) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_state_is_the_same_at_every_position_and_as_allocated() -> None:
    config = lstm_shape(layers=3)
    cost = cost_of(config)
    state = Lstm(config).new_state(1, 64, torch.float16)
    assert cost.kv_bytes(1) == cost.kv_bytes(10_000) == cost.kv_bytes_read(7) == state.bytes
    assert cost.kv_bytes(1, 4) == 2 * state.bytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16])
def test_bytes_are_those_of_the_tensors_on_disk(tmp_path: Path, bits: int, group_size: int) -> None:
    def stored(folder: Path) -> int:
        tensors = load_file(folder / "model.safetensors").values()
        return sum(value.numel() * value.element_size() for value in tensors)

    parent = write_variant(tmp_path / "baseline", lstm())
    cost = cost_of(lstm_shape())
    assert cost.weight_bytes() == stored(parent.path)
    method = Rtn(bits=bits, group_size=group_size)
    child, _ = make_variant(method, parent, None, name="q", target=tmp_path / "q", seed=0)
    assert cost.weight_bytes(Format.stored(Grid(bits, group_size))) == stored(child.path)


@pytest.mark.parametrize("changes", SHAPES)
def test_a_prefill_reads_the_encoder_too(changes: dict[str, Any]) -> None:
    config = lstm_shape(**changes)
    cost, sizes = cost_of(config), {name: value.nbytes for name, value in Lstm(config).named_parameters()}
    encoder = sum(size for name, size in sizes.items() if ".encoder." in name)
    assert cost.prefill_weight_bytes() - cost.weight_bytes_per_token() == encoder > 0
    assert config.tied_head is (cost.prefill_weight_bytes() == sum(sizes.values()))


def test_the_size_is_the_one_its_comment_names() -> None:
    text = (Path(__file__).parents[2] / "conf/model/lstm.yaml").read_text()
    assert "about 5.5 million parameters with an 8k vocabulary" in text
    options = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
    assert 5.4e6 < cost_of(LstmConfig(**{**options, "vocab_size": 8192})).parameters < 5.6e6
