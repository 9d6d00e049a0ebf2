from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.artifacts import Variant, write_json
from hasten.compression.base import Calibration
from hasten.compression.depth import Depth, block_influence, least_missed
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from hasten.model.lstm_config import LstmConfig, to_json
from tests.compression.texts import text
from tests.tiny import decoder, shape, write_variant

TEXT = text(12, 16)


def with_idle_blocks(*idle: int, layers: int = 4, leak: float = 0.0) -> Decoder:
    """Blocks that (nearly) pass their input on."""
    model = decoder(shape(layers=layers), spread=0.2)
    with torch.no_grad():
        for layer in idle:
            model.model.layers[layer].self_attn.o_proj.weight.mul_(leak)
            model.model.layers[layer].mlp.down_proj.weight.mul_(leak)
    return model


def dropped(tmp_path: Path, model: Decoder, drop: int = 1, criterion: str = "influence") -> Variant:
    parent = write_variant(tmp_path / "baseline", model)
    return make_variant(Depth(drop, criterion), parent, TEXT, name="shallow", target=tmp_path / "shallow", seed=0)[0]


@pytest.mark.parametrize("idle", [0, 1, 2, 3])
def test_the_block_that_changes_least_is_dropped_wherever_it_is(tmp_path: Path, idle: int) -> None:
    model = with_idle_blocks(idle, leak=0.05)
    variant = dropped(tmp_path, model)
    notes = variant.manifest["notes"]
    assert notes["dropped"] == [idle]
    assert min(notes["influence"]) == notes["influence"][idle]
    kept = [layer for layer in range(4) if layer != idle]
    loaded = load_network(variant)
    assert loaded.config.layers == 3
    for new, old in enumerate(kept):  # renumbered, in their old order
        theirs = model.model.layers[old].state_dict()
        assert all(torch.equal(v, theirs[name]) for name, v in loaded.model.layers[new].state_dict().items())


def test_dropping_blocks_that_do_nothing_changes_no_logit(tmp_path: Path) -> None:
    model = with_idle_blocks(1, 3)
    variant = dropped(tmp_path, model, drop=2)
    assert variant.manifest["notes"]["dropped"] == [1, 3]
    with torch.inference_mode():
        assert torch.equal(load_network(variant).eval()(TEXT.ids), model(TEXT.ids))


def nats(model: Decoder, layers: list[int], calibration: Calibration) -> float:
    """The same network built anew with those blocks alone, and the loss by its formula in float64."""
    small = decoder(shape(layers=len(layers)), spread=0.2)
    state = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(layers):
        own = model.model.layers[old].state_dict()
        state |= {f"model.layers.{new}.{name}": value for name, value in own.items()}
    small.load_state_dict(state)
    with torch.inference_mode():
        logits = small.lm_head(small.hidden(calibration.ids, documents=calibration.documents)).double()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, calibration.ids[:, 1:, None])[..., 0]
    return float(-(chosen * calibration.weights[:, 1:]).sum() / calibration.weights.sum())


def test_perplexity_drops_one_after_another_what_the_loss_misses_least(tmp_path: Path) -> None:
    model = decoder(shape(layers=4), spread=0.2)
    calibration = text(12, 16, documents=2, padding=3)
    left, order, expected = [0, 1, 2, 3], [], [nats(model, [0, 1, 2, 3], calibration)]
    for _ in range(2):
        losses = {layer: nats(model, [one for one in left if one != layer], calibration) for layer in left}
        order.append(min(losses, key=losses.__getitem__))
        expected.append(losses[order[-1]])
        left.remove(order[-1])
    assert least_missed(model, calibration, 2) == (order, pytest.approx(expected, rel=1e-5))
    variant = dropped(tmp_path, model, drop=2, criterion="perplexity")
    order, losses = least_missed(model, TEXT, 2)
    assert variant.manifest["notes"] == {"dropped": sorted(order), "loss": [round(loss, 6) for loss in losses]}
    kept = [layer for layer in range(4) if layer not in order]
    assert nats(model, kept, TEXT) == pytest.approx(losses[-1], rel=1e-5)
    with torch.inference_mode():
        logits = load_network(variant).eval()(TEXT.ids)[:, :-1].double().log_softmax(-1)
    assert -float(logits.gather(2, TEXT.ids[:, 1:, None]).mean()) == pytest.approx(losses[-1], rel=1e-5)
    assert variant.hash == dropped(tmp_path / "again", model, drop=2, criterion="perplexity").hash


def test_an_unknown_criterion_is_refused() -> None:
    with pytest.raises(UserError, match=r"compression\.criterion must be one of \['influence', .*\], got 'size'"):
        Depth(criterion="size")


def test_influence_is_one_minus_the_mean_cosine_over_all_tokens_whatever_the_batches() -> None:
    model = with_idle_blocks(2)
    scores = block_influence(model, TEXT)
    assert scores[2] == pytest.approx(0, abs=1e-9)
    with torch.inference_mode():
        x = model.model.embed_tokens(TEXT.ids)
        y = model.model.layers[0](x, model.model.view(TEXT.ids, 0, None, slides=False), None)
    expected = 1 - float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())
    assert scores[0] == pytest.approx(expected, rel=1e-5)
    assert scores[0] > 0.05
    assert block_influence(model, TEXT, batch_size=5) == pytest.approx(scores, rel=1e-5)


def test_watching_influence_leaves_no_hooks_behind() -> None:
    model = decoder()
    block_influence(model, TEXT)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_shallow_model_generates_and_can_be_quantised_in_turn(tmp_path: Path) -> None:
    shallow = dropped(tmp_path, decoder(shape(layers=3)))
    child, _ = make_variant(Rtn(bits=8), shallow, None, name="shallow-int8", target=tmp_path / "both", seed=0)
    assert child.lineage == ["baseline", "shallow", "shallow-int8"]
    for variant in (shallow, child):
        assert len(list(Eager(threads=1).load(variant, tmp_path).submit(Request(0, (5, 6), 4)))) == 4


def test_the_same_text_drops_the_same_block_in_the_same_bytes(tmp_path: Path) -> None:
    model = decoder(shape(layers=3))
    first, second = (dropped(tmp_path / name, model) for name in ("a", "b"))
    assert first.hash == second.hash


@pytest.mark.parametrize("drop", [0, -1])
def test_dropping_nothing_is_refused(drop: int) -> None:
    with pytest.raises(UserError, match=rf"compression\.drop must be at least 1, got {drop}"):
        Depth(drop)


def test_dropping_every_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compression\.drop must be below the parent's 2 layers, got 2"):
        dropped(tmp_path, decoder(), drop=2)


def test_depth_needs_text_and_a_float_parent(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    with pytest.raises(UserError, match="depth needs calibration text"):
        Depth().compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match=r"depth needs a float parent, got .* which is quantised; quantise last"):
        Depth().compress(quantised, TEXT, 0)


def test_a_network_without_blocks_is_refused_by_name(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    write_json(parent.path / "config.json", to_json(LstmConfig(vocab_size=100), bos_id=0, eos_id=1, pad_id=2))
    with pytest.raises(UserError, match=r"depth is for decoders \(llama, .*\), got model_type 'hasten_lstm'"):
        Depth().compress(parent, TEXT, 0)
