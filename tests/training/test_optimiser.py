from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.model.decoder import Decoder
from hasten.model.network import Network
from hasten.training.optimiser import Together, build_optimiser, learning_rate_factor
from hasten.training.options import Optimiser
from tests.tiny import decoder, lstm, lstm_shape, shape, training


def learn(model: Decoder, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps on one fixed batch; the loss before each."""
    ids = torch.arange(3, 35).view(2, 16)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


def groups(model: Network, optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """Weight decay by parameter name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group["weight_decay"]) for group in optimiser.param_groups for p in group["params"]]
    assert len(found) == len(dict(found))  # nothing is optimised twice
    return dict(found)


@pytest.mark.parametrize("kind", list(Optimiser))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recurrent", [False, True])
def test_every_weight_is_optimised_once_and_only_the_blocks_matrices_decay(
    kind: Optimiser, tied: bool, recurrent: bool
) -> None:
    model = lstm(lstm_shape(tied_head=tied)) if recurrent else decoder(shape(tied_head=tied))
    decay = groups(model, build_optimiser(model, training(optimiser=kind, weight_decay=0.3)))
    assert decay.keys() == {name for name, _ in model.named_parameters()}
    matrices = {name for name in decay if name.endswith("_proj.weight")}
    assert {name for name, value in decay.items() if value == 0.3} == matrices
    assert set(decay.values()) == {0.0, 0.3}


@pytest.mark.parametrize("kind", list(Optimiser))
def test_frozen_weights_are_left_alone(kind: Optimiser) -> None:
    model = decoder()
    model.model.layers[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = build_optimiser(model, training(optimiser=kind))
    learn(model, optimiser, 2)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".layers.0." not in name}


@pytest.mark.parametrize("kind", list(Optimiser))
@pytest.mark.parametrize("kept", ["q_proj", "norm"])
def test_any_part_can_be_trained_alone(kind: Optimiser, kept: str) -> None:
    model = decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kept in name)
    optimiser = build_optimiser(model, training(optimiser=kind))
    assert set(groups(model, optimiser)) == {name for name, _ in model.named_parameters() if kept in name}
    learn(model, optimiser, 1)


@pytest.mark.parametrize("kind", list(Optimiser))
def test_both_learn(kind: Optimiser) -> None:
    model = Decoder(shape())
    model.initialise(0)
    losses = learn(model, build_optimiser(model, training(optimiser=kind, learning_rate=0.01)), 20)
    assert losses[-1] < 0.3 * losses[0]


def test_a_muon_step_turns_a_matrix_in_all_directions_alike() -> None:
    model = decoder()
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    optimiser = build_optimiser(model, training(optimiser=Optimiser.muon, weight_decay=0.0))
    for parameter in model.parameters():  # a gradient with one direction far stronger than the others
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        parameter.grad.view(-1)[: parameter.shape[-1]] *= 1000
    optimiser.step()
    singular = torch.linalg.svdvals(weight.detach() - before)
    assert singular.max() / singular.min() < 10
    assert torch.linalg.cond(weight.grad) > 100


def test_a_changed_learning_rate_reaches_both_optimisers_also_after_loading() -> None:
    model = decoder()
    optimiser = build_optimiser(model, training())
    assert isinstance(optimiser, Together)
    for again in (False, True):
        if again:
            optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for group in optimiser.param_groups:
            group["lr"] = 0.0
        learn(model, optimiser, 2)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for group in optimiser.param_groups:
            group["lr"] = 0.01
        learn(model, optimiser, 1)
        assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", list(Optimiser))
def test_a_saved_state_continues_bit_for_bit(kind: Optimiser) -> None:
    whole = decoder(spread=0.1)
    options = training(optimiser=kind)
    optimiser = build_optimiser(whole, options)
    learn(whole, optimiser, 3)
    resumed = copy.deepcopy(whole)
    state: dict[str, Tensor] = copy.deepcopy(optimiser.state_dict())
    learn(whole, optimiser, 3)
    other = build_optimiser(resumed, options)
    other.load_state_dict(state)
    learn(resumed, other, 3)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_learning_rate_rises_linearly_then_falls_along_a_cosine_to_its_final_fraction() -> None:
    options = training(steps=100, warmup_fraction=0.1, final_learning_rate_fraction=0.2)
    factors = [learning_rate_factor(step, 100, options) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[55] == pytest.approx(0.6)  # half way down from 1 to 0.2
    assert factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(1, 300),
    step=st.integers(0, 400),
    warmup=st.floats(0, 0.99),
    final=st.floats(0, 0.99),
)
def test_the_learning_rate_is_never_above_its_peak_nor_zero_in_warm_up(
    steps: int, step: int, warmup: float, final: float
) -> None:
    options = training(warmup_fraction=warmup, final_learning_rate_fraction=final)
    assert 0 <= learning_rate_factor(step, steps, options) <= 1
    assert learning_rate_factor(0, steps, options) > 0
