"""Computing a block twice instead of remembering it: the same gradients from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten.errors import UserError
from hasten.model.decoder import Decoder
from tests.tiny import decoder, lstm, shape

IDS = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(0))
DOCUMENTS = (torch.arange(24) >= 9).int().expand(2, -1)


def gradients(model: Decoder, recompute: bool, documents: Tensor | None = DOCUMENTS) -> dict[str, Tensor]:
    model.recompute = recompute
    model.zero_grad()
    torch.manual_seed(3)
    model.hidden(IDS, documents=documents).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


class Made(TorchDispatchMode):
    """Everything that was computed, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                storage = StorageWeakRef(value.untyped_storage())
                self.storages[storage.cdata] = (storage, value.untyped_storage().nbytes())
        return made

    def living_bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def kept_bytes(model: Decoder, recompute: bool) -> int:
    """What a forward pass keeps for the backward one, weights aside."""
    model.recompute = recompute
    with Made() as made:
        out = model.hidden(IDS)
    assert out.requires_grad
    for weight in model.parameters():
        made.storages.pop(StorageWeakRef(weight.untyped_storage()).cdata, None)
    return made.living_bytes()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_bit_for_bit_those_of_remembering(
    changes: dict[str, Any], dropout: float, autocast: bool
) -> None:
    model = decoder(shape(**changes)).train()
    model.set_dropout(dropout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        remembered, again = gradients(model, False), gradients(model, True)
    assert remembered.keys() == again.keys() == {name for name, _ in model.model.named_parameters()}
    for name, gradient in remembered.items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, again[name]), name


def test_a_block_costs_its_input_alone() -> None:
    few, many = (decoder(shape(layers=layers)).train() for layers in (2, 6))
    inputs = IDS.numel() * 32 * 4  # (B, T, hidden), float32
    again, remembered = ((kept_bytes(many, on) - kept_bytes(few, on)) / 4 for on in (True, False))
    assert again == inputs
    assert remembered > 10 * again


def test_nothing_is_computed_twice_without_gradients() -> None:
    model, calls = decoder(), []
    model.recompute = True
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model.hidden(IDS)
    assert len(calls) == 1
    model.hidden(IDS).sum().backward()
    assert len(calls) == 3
    with torch.inference_mode():
        state = model.new_state(2, 24, torch.float32)
        assert torch.allclose(model(IDS, state), model.lm_head(expected[:, -1:]), atol=1e-4)


def test_blocks_are_what_a_decoder_repeats() -> None:
    model = decoder(shape(layers=3))
    assert model.blocks() == list(model.model.layers)
    recurrent = lstm()
    assert recurrent.blocks() == [*recurrent.model.encoder.layers, *recurrent.model.decoder.layers]


def test_compiled_blocks_share_one_graph_and_compute_the_same() -> None:
    """Of all layers: else a deep model would be compiled layer by layer, and at some depth no more."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    config = shape(layers=12, hidden_size=8, heads=2, kv_heads=1, feed_forward_size=8)
    expected = {again: gradients(decoder(config).train(), again) for again in (False, True)}
    model = decoder(config).train()
    for block in model.blocks():
        block.compile(backend=counting, fullgraph=True)
    for again, plain in expected.items():
        for name, gradient in gradients(model, again).items():
            assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-6), name
    assert 1 <= len(graphs) <= 2
    torch.compiler.reset()


def test_an_lstm_refuses_to_recompute_with_the_option_to_change() -> None:
    model = lstm()
    assert decoder().can_recompute and not model.can_recompute
    model.recompute = False
    with pytest.raises(UserError, match=r"training\.activation_checkpointing must be false .* \(an LSTM\), got true"):
        model.recompute = True
    assert not model.recompute
