from __future__ import annotations

import torch

from hasten.tuning.full import Full
from tests.tiny import decoder


def test_every_weight_trains() -> None:
    model = decoder()
    model.requires_grad_(False)
    Full().attach(model, seed=0, low_precision=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attaching_and_merging_add_and_change_nothing() -> None:
    model, untouched = decoder(), decoder().state_dict()
    Full().attach(model, seed=0, low_precision=True)
    Full().merge(model)
    assert model.state_dict().keys() == untouched.keys()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())


def test_it_goes_with_every_strategy() -> None:
    for strategy in ("single", "ddp", "fsdp", "tensor_parallel", "hybrid"):
        Full().refuse_strategy(strategy)
