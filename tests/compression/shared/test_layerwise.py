from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.compression.base import Calibration
from hasten.compression.shared.layerwise import Group, Keeping, Treatment, groups, walk
from hasten.model.decoder import Decoder
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, shape

SHAPES = {
    "llama": shape(),
    "gemma": shape(layers=3, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"], **GEMMA),
}


class Recorder(Treatment):
    """Keeps what it is shown, and optionally ruins what it treats."""

    def __init__(self, *, ruin: bool = False) -> None:
        self.ruin, self.seen, self.order = ruin, {}, []  # type: ignore[var-annotated]
        self._now: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        self._now.append(x.clone())

    def treat(self, group: Group) -> None:
        self.order.append(group.names)
        self.seen[group.names[0]] = torch.cat(self._now)
        self._now = []
        if self.ruin:
            for linear in group.linears:
                linear.weight.mul_(0.5)


def inputs(model: Decoder, calibration: Calibration) -> dict[str, Tensor]:
    """What each matrix is given in one ordinary pass, without padding."""
    found: dict[str, Tensor] = {}
    real = calibration.documents >= 0
    for group in groups(model, head=True):
        for name, linear in zip(group.names, group.linears, strict=True):
            linear.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0][real]}))
    with torch.no_grad():
        model.lm_head(model.hidden(calibration.ids, documents=calibration.documents))
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_every_matrix_sees_what_an_ordinary_pass_gives_it(family: str) -> None:
    model, calibration = decoder(SHAPES[family]), text(11, 12, documents=2, padding=3)
    recorder = Recorder()
    walk(model, calibration, recorder, head=True)
    expected = inputs(model, calibration)
    assert [name for names in recorder.order for name in names] == list(expected)
    for name, seen in recorder.seen.items():
        assert seen.shape[0] == calibration.tokens
        torch.testing.assert_close(seen, expected[name], rtol=1e-5, atol=1e-5)


def test_later_matrices_see_what_treated_ones_make() -> None:
    model, calibration = decoder(shape(tied_head=False)), text()
    recorder = Recorder(ruin=True)
    walk(model, calibration, recorder, head=True)
    after = inputs(model, calibration)  # of the network with every matrix ruined
    for name, seen in recorder.seen.items():
        torch.testing.assert_close(seen, after[name], rtol=1e-5, atol=1e-5)


def test_the_head_is_left_alone_unless_asked_for_and_no_hook_stays() -> None:
    model = decoder()
    recorder = Recorder()
    walk(model, text(), recorder)
    assert ("lm_head",) not in recorder.order
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pass_ends_where_the_inputs_are_reached() -> None:
    model, calls = decoder(), []
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    walk(model, text(8, 16), Recorder())
    assert len(calls) == len(model.model.layers)  # the pass after the last group alone


def test_a_network_that_nobody_needs_afterwards_is_given_back() -> None:
    calibration, seen = text(), []
    for last in (False, True):
        model, recorder = decoder(SHAPES["llama"]), Recorder(ruin=True)
        walk(model, calibration, recorder, head=True, last=last)
        assert all(weight.is_meta is last for weight in model.model.layers.parameters())
        assert model.model.embed_tokens.weight.is_meta is last
        assert not model.lm_head.weight.is_meta  # tied or not, it was treated last
        seen.append(recorder.seen)
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())
    walk(model := decoder(SHAPES["llama"]), calibration, Recorder(), last=True)
    assert model.lm_head.weight.is_meta  # nobody asked for it


def test_what_became_of_the_matrices_outlives_the_network() -> None:
    ruined, kept = decoder(SHAPES["llama"]), Keeping(Recorder(ruin=True))
    expected = {name: value / 2 for name, value in ruined.state_dict().items() if name.endswith("_proj.weight")}
    walk(ruined, text(), kept, last=True)
    assert kept.weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in kept.weights.items())
