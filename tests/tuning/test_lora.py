from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hasten.artifacts import load_checkpoint
from hasten.errors import UserError
from hasten.model.adapter import Frozen, LoraLinear
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from hasten.model.network import Network
from hasten.tuning.lora import TARGETS, Lora
from tests.tiny import decoder, lstm, shape, write_checkpoint

IDS = torch.tensor([[5, 17, 60, 3, 99, 42], [9, 8, 7, 6, 5, 4]])


def adapted(tuning: Lora, model: Decoder | None = None, *, low: bool = False, learned: float = 0.0) -> Decoder:
    """learned: how far B has moved from zero, by chance."""
    model = model or decoder(spread=0.2)
    tuning.attach(model, seed=7, low_precision=low)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_b"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * learned)
    return model


def bfloat16_decoder(**changes: Any) -> Decoder:
    """In float32, with weights that bfloat16 can hold."""
    model = decoder(shape(**changes), spread=0.2)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


def bits(model: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone().view(torch.int32) for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    rank=st.integers(1, 5),
    alpha=st.floats(0.1, 50),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_an_adapted_layer_is_the_papers_formula_and_so_is_the_merged_one(
    inputs: int, outputs: int, rank: int, alpha: float, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    w, b = linear.weight.detach().clone(), linear.bias.detach().clone() if bias else torch.zeros(outputs).double()
    layer = LoraLinear(linear, False, rank=rank, scale=alpha / rank, dropout=0.0, generator=generator)
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(outputs, rank, generator=generator))
    a, up = layer.lora_a.detach(), layer.lora_b.detach()
    x = torch.randn(inputs, generator=generator, dtype=torch.float64)

    def entry(row: int, column: int) -> float:
        product = sum(float(up[row, k]) * float(a[k, column]) for k in range(rank))
        return float(w[row, column]) + alpha / rank * product

    expected = torch.tensor(
        [sum(entry(row, j) * float(x[j]) for j in range(inputs)) + float(b[row]) for row in range(outputs)],
        dtype=torch.float64,
    )
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-10)
        merged = layer.merged()
        assert type(merged) is nn.Linear
        assert torch.allclose(merged(x), expected, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_formula() -> None:
    layer = LoraLinear(
        nn.Linear(5, 4, dtype=torch.float64), False, rank=2, scale=3.0, dropout=0.0, generator=torch.Generator()
    )
    layer.lora_b.data.normal_()
    x, slope = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    (layer(x) * slope).sum().backward()
    a, b = layer.lora_a.detach(), layer.lora_b.detach()
    assert layer.lora_b.grad is not None and layer.lora_a.grad is not None
    assert torch.allclose(layer.lora_b.grad, 3 * slope.T @ (x @ a.T))
    assert torch.allclose(layer.lora_a.grad, 3 * (slope @ b).T @ x)
    assert layer.linear.weight.grad is None and layer.linear.bias.grad is None


def test_training_starts_from_the_base_model_and_merging_at_once_restores_every_bit() -> None:
    model = decoder(shape(qkv_bias=True))
    with torch.no_grad():
        model.model.get_parameter("layers.0.mlp.up_proj.weight")[0, :3] = torch.tensor([0.0, -0.0, 1e-40])
    before, logits = bits(model), model(IDS)
    adapted(Lora(rank=3), model)
    assert torch.equal(model(IDS), logits)
    Lora(rank=3).merge(model)
    assert same(bits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("targets", [list(TARGETS), ["q_proj", "v_proj"]])
def test_a_merged_model_answers_as_the_adapted_one_did_with_the_names_of_a_plain_one(targets: list[str]) -> None:
    tuning, plain = Lora(rank=4, alpha=8.0, targets=targets), decoder(spread=0.2)
    model = adapted(tuning, learned=0.3)
    with torch.inference_mode():
        logits = model(IDS)
        assert not torch.allclose(logits, plain(IDS), atol=0.1)
        tuning.merge(model)
        assert torch.allclose(model(IDS), logits, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not [module for module in model.modules() if isinstance(module, Frozen)]
    moved = {name for name, value in plain.state_dict().items() if not torch.equal(model.state_dict()[name], value)}
    assert {name.split(".")[-2] for name in moved} == set(targets)


def test_only_adapters_train() -> None:
    model = adapted(Lora(rank=2, targets=["q_proj", "down_proj"]))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".", 3)[3] for name in trained} == {
        f"{place}.{matrix}" for place in ("self_attn.q_proj", "mlp.down_proj") for matrix in ("lora_a", "lora_b")
    }
    assert sum(weight.numel() for weight in trained.values()) == 2 * 2 * ((32 + 32) + (64 + 32))  # layers, rank
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # A has no slope before B has moved
        optimiser.zero_grad()
        model(IDS).square().mean().backward()
        optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained.keys()


@pytest.mark.parametrize("recompute", [False, True])
def test_it_learns_although_no_input_of_the_first_block_has_a_gradient(recompute: bool) -> None:
    tuning = Lora(rank=4)
    model = adapted(tuning).train()
    model.recompute = recompute
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_what_is_drawn_depends_on_the_seed_and_has_the_spread_of_its_input() -> None:
    models = [decoder(shape(hidden_size=128, feed_forward_size=256)) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(len(models))  # the global generator plays no part
        Lora(rank=8).attach(model, seed=seed, low_precision=False)
    one, again, other = (model.state_dict() for model in models)
    assert same(one, again)
    name = "model.layers.1.mlp.down_proj.lora_a"
    assert not torch.equal(one[name], other[name])
    assert one[name].shape == (8, 256)
    assert float(one[name].std()) == pytest.approx(1 / 16, rel=0.1)


def test_frozen_weights_that_bfloat16_can_hold_are_kept_in_it_and_come_back_bit_for_bit() -> None:
    model = bfloat16_decoder(qkv_bias=True)
    odd = model.model.get_parameter("layers.1.mlp.gate_proj.weight")
    with torch.no_grad():
        odd[3, 4] = 1 + 2**-20  # one weight that bfloat16 would round
    before = bits(model)
    tuning = Lora(targets=["q_proj", "gate_proj"])
    adapted(tuning, model, low=True)
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    wide = {name for name, kind in kinds.items() if name.endswith("_proj.linear.weight") and kind is torch.float32}
    assert wide == {"model.layers.1.mlp.gate_proj.linear.weight"}
    assert all(kinds[name] is torch.float32 for name in kinds if "lora" in name or "norm" in name or "bias" in name)
    assert kinds["model.embed_tokens.weight"] is torch.float32
    tuning.merge(model)
    assert same(bits(model), before)


@pytest.mark.parametrize("autocast", [True, False])
def test_narrow_weights_compute_what_wide_ones_do(autocast: bool) -> None:
    """In training, under autocast, and in validation without it."""
    wide, narrow = (adapted(Lora(rank=2), bfloat16_decoder(), low=low, learned=0.2) for low in (False, True))
    found = []
    for model in (wide, narrow):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(IDS)
        logits.square().mean().backward()
        slopes = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(slopes) == 2 * 7 * 2
        found.append([logits, *slopes])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_without_low_precision_nothing_is_kept_narrow() -> None:
    model = adapted(Lora(targets=["q_proj"]), bfloat16_decoder(), low=False)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_dropout_acts_on_what_an_adapter_reads_and_is_not_the_networks() -> None:
    model = adapted(Lora(dropout=0.5), learned=0.3).train()
    torch.manual_seed(0)
    one, other = model(IDS), model(IDS)
    assert not torch.allclose(one, other, atol=1e-2)
    model.set_dropout(0.0)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 2 * 7
    assert {layer.dropout.p for layer in layers} == {0.5}
    model.eval()
    assert torch.equal(model(IDS), model(IDS))
    for layer in layers:
        layer.dropout.p = 1 - 1e-9  # all of it: the base model is left
    model.train()
    assert torch.allclose(model(IDS), decoder(spread=0.2)(IDS), atol=1e-5)


def test_a_tuned_checkpoint_is_a_plain_one(tmp_path: Path) -> None:
    tuning = Lora(rank=2)
    model = adapted(tuning, learned=0.1)
    logits = model(IDS)
    tuning.merge(model)
    write_checkpoint(tmp_path / "tuned", model)
    loaded = load_network(load_checkpoint(tmp_path / "tuned")).eval()
    assert torch.allclose(loaded(IDS), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "tuning.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "tuning.alpha must be above 0 and finite, got 0.0"),
        ({"alpha": float("nan")}, "tuning.alpha must be above 0 and finite, got nan"),
        ({"alpha": float("inf")}, "tuning.alpha must be above 0 and finite, got inf"),
        ({"targets": []}, "tuning.targets must name at least one of ['q_proj'"),
        ({"dropout": 1.0}, "tuning.dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": float("nan")}, "tuning.dropout must be at least 0 and below 1, got nan"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Lora(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "mlp"])
def test_a_target_that_is_no_linear_layer_of_a_block_is_refused_with_those_there_are(target: str) -> None:
    model = decoder()
    before = list(model.state_dict())
    with pytest.raises(UserError) as error:
        Lora(targets=["q_proj", target]).attach(model, seed=0, low_precision=True)
    assert str(error.value) == f"tuning.targets must be one of {sorted(TARGETS)}, got {target!r}"
    assert list(model.state_dict()) == before
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("targets", [list(TARGETS), ["input_proj"], ["lm_head"]])
def test_an_lstm_has_no_layer_that_an_adapter_could_stand_in_for(targets: list[str]) -> None:
    with pytest.raises(UserError, match=r"tuning must be full for a model .* no linear layers \(an LSTM\), got lora"):
        Lora(targets=targets).attach(lstm(), seed=0, low_precision=False)


@pytest.mark.parametrize("strategy", ["tensor_parallel", "hybrid"])
def test_a_strategy_that_splits_matrices_is_refused(strategy: str) -> None:
    for fine in ("single", "ddp", "fsdp"):
        Lora().refuse_strategy(fine)
    with pytest.raises(UserError) as error:
        Lora().refuse_strategy(strategy)
    assert str(error.value) == (
        f"training.strategy must be one of ['single', 'ddp', 'fsdp'] with tuning=lora, got '{strategy}'"
    )
