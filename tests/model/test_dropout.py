"""What training leaves out at random: where, how much, and that nothing else notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.model.network import Network
from tests.tiny import GEMMA, decoder, lstm, lstm_shape, shape

IDS = torch.tensor([[5, 17, 60, 3, 99, 42, 8, 8], [9, 8, 7, 6, 5, 4, 3, 99]])
ALL = 1 - 1e-9  # a share that leaves nothing
NETWORKS = {"llama": decoder, "gemma": lambda: decoder(shape(**GEMMA)), "lstm": lambda: lstm(lstm_shape(layers=3))}


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> Network:
    made: Network = NETWORKS[request.param]()
    return made


def hidden(model: Network, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.hidden(IDS, torch.tensor([3, 2]))


def test_without_dropout_training_computes_what_evaluation_does(model: Network) -> None:
    expected = hidden(model.eval())
    assert torch.equal(hidden(model.train()), expected)
    model.set_dropout(0.5)
    model.set_dropout(0.0)
    assert torch.equal(hidden(model), expected)


def test_dropout_is_decided_by_the_seed_and_off_in_evaluation(model: Network) -> None:
    expected = hidden(model.eval())
    model.set_dropout(0.3)
    assert torch.equal(hidden(model), expected)
    model.train()
    assert torch.equal(hidden(model, 1), hidden(model, 1))
    assert not torch.allclose(hidden(model, 1), hidden(model, 2), atol=1e-2)
    assert not torch.allclose(hidden(model, 1), expected, atol=1e-2)


def test_a_checkpoint_does_not_know_of_dropout(model: Network) -> None:
    names = list(model.state_dict())
    model.set_dropout(0.3)
    assert list(model.state_dict()) == names
    assert not [name for name in names if "dropout" in name]


@pytest.mark.parametrize("changes", [{}, GEMMA], ids=["llama", "gemma"])
def test_what_stays_is_enlarged_and_what_goes_is_zero(changes: dict[str, Any]) -> None:
    model = decoder(shape(hidden_size=64, **changes)).train()
    model.set_dropout(0.25)
    seen: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _, given, made: seen.append((given[0], made)))
    hidden(model)
    assert len(seen) == 2 * 2  # each half of each block
    for given, made in seen:
        stays = made != 0
        assert torch.allclose(made[stays], given[stays] / 0.75)
        assert float(stays.float().mean()) == pytest.approx(0.75, abs=0.06)  # of 1,024 draws: 4 standard deviations


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_decoder_that_drops_everything_is_its_embedding(name: str) -> None:
    model = NETWORKS[name]().train()
    model.set_dropout(ALL)
    embedded = model.model.embed_tokens(IDS) * (32**0.5 if name == "gemma" else 1)
    assert torch.allclose(hidden(model), model.model.norm(embedded), atol=1e-6)


def test_an_lstm_drops_what_goes_up_and_remembers_all_the_same() -> None:
    model = lstm(lstm_shape(layers=2)).train()
    kept = model.model.read(IDS, torch.tensor([8, 8]))
    model.set_dropout(ALL)
    assert torch.equal(hidden(model), torch.zeros(2, 8, 32))  # nothing reaches the head
    memory = model.model.read(IDS, torch.tensor([8, 8]))
    for one, other in zip(memory[0], kept[0], strict=True):
        assert torch.equal(one, other)  # the first layer, from step to step
    assert not torch.allclose(memory[1][0], kept[1][0], atol=1e-2)  # the second has heard nothing
