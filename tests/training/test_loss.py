from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.model.decoder import Decoder
from hasten.training import loss
from hasten.training.data import Batch
from hasten.training.loss import token_losses, weighted_loss
from tests.tiny import decoder, lstm, shape

NETWORKS = {"decoder": decoder, "lstm": lstm}


def textbook(model: Decoder, batch: Batch) -> Tensor:
    ids, weights = batch["ids"], batch["weights"][:, 1:]
    logits = model(ids)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(weights.shape)
    return (losses * weights).sum() / weights.sum()


def gradients(model: Decoder, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), chunk=st.sampled_from([1, 7, 512]), tied=st.booleans())
def test_loss_and_gradients_equal_the_textbooks_whatever_the_chunk(seed: int, chunk: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = decoder(shape(tied_head=tied), seed, spread=0.2)
    batch = {
        "ids": torch.randint(100, (3, 9), generator=generator),
        "weights": torch.rand(3, 9, generator=generator) * (torch.rand(3, 9, generator=generator) > 0.3),
        "prompt_tokens": torch.tensor([1, 4, 9]),  # nothing to a decoder
    }
    batch["weights"][0, 1] = 1.0  # at least one token counts
    batch["total"] = batch["weights"][:, 1:].sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK", chunk)
        ours = weighted_loss(model, batch)
        got = gradients(model, ours * 3)  # scaled, as gradient accumulation does
    expected = textbook(model, batch)
    wanted = gradients(model, expected * 3)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], wanted[name], rtol=1e-3, atol=1e-5) for name in wanted)


def test_tokens_of_no_weight_change_neither_loss_nor_gradient() -> None:
    model = decoder()
    ids = torch.randint(3, 100, (2, 8))
    weights = torch.tensor([0.0, 1, 1, 1, 1, 0, 0, 0]).repeat(2, 1)
    changed = ids.clone()
    changed[:, 5:] = 2  # padding
    rest = {"weights": weights, "prompt_tokens": torch.tensor([1, 1]), "total": weights.sum()}
    before = gradients(model, weighted_loss(model, {"ids": ids, **rest}))
    after = gradients(model, weighted_loss(model, {"ids": changed, **rest}))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_decoder_is_judged_on_what_follows_the_prompt() -> None:
    model, ids = lstm(spread=0.3), torch.randint(3, 100, (2, 8))
    prompts = torch.tensor([3, 6])
    weights = (torch.arange(8) >= prompts[:, None]).float()
    loss = weighted_loss(model, {"ids": ids, "weights": weights, "prompt_tokens": prompts, "total": weights.sum()})
    hidden = model.hidden(ids, prompts)
    first = F.cross_entropy(model.lm_head(hidden[0, 2:7]), ids[0, 3:])
    second = F.cross_entropy(model.lm_head(hidden[1, 5:7]), ids[1, 6:])
    assert loss.item() == pytest.approx((5 * first + 2 * second).item() / 7, rel=1e-5)


def test_the_parts_of_a_step_add_up_to_its_mean_however_unequal_they_are() -> None:
    model, ids = decoder(), torch.randint(3, 100, (3, 8))
    weights = (torch.arange(8) < torch.tensor([[8], [3], [2]])).float()
    weights[:, 0] = 0
    whole = {"ids": ids, "weights": weights, "prompt_tokens": torch.ones(3, dtype=torch.int64), "total": weights.sum()}
    parts = [{**{k: v[i : i + 1] for k, v in whole.items() if k != "total"}, "total": weights.sum()} for i in range(3)]
    assert sum(weighted_loss(model, part).item() for part in parts) == pytest.approx(weighted_loss(model, whole).item())


def test_documents_of_a_row_are_scored_as_if_each_were_alone() -> None:
    model, ids = decoder(), torch.randint(3, 100, (1, 10))
    rest = {"prompt_tokens": torch.ones(1, dtype=torch.int64)}
    weights = torch.tensor([[0.0, 1, 1, 1, 0, 1, 1, 1, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    together = weighted_loss(
        model, {"ids": ids, "weights": weights, "documents": documents, "total": weights.sum(), **rest}
    )
    apart = [
        weighted_loss(model, {"ids": ids[:, part], "weights": weights[:, part], "total": weights.sum(), **rest})
        for part in (slice(0, 4), slice(4, 10))
    ]
    assert together.item() == pytest.approx(sum(one.item() for one in apart), rel=1e-5)


def test_token_losses_are_negative_log_probabilities_in_nats() -> None:
    model, ids = decoder(), torch.randint(100, (2, 6))
    with torch.inference_mode():
        logits = model(ids)
        losses = token_losses(logits, ids)
    assert losses.shape == (2, 6)
    assert (losses[:, 0] == 0).all()
    assert float(losses[1, 4]) == pytest.approx(-float(logits[1, 3].log_softmax(-1)[ids[1, 4]]), rel=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_under_bfloat16_autocast_the_loss_stays_float32_and_close(kind: str) -> None:
    model = NETWORKS[kind](spread=0.1)
    split = torch.tensor([1, 8])
    weights = (torch.arange(16) >= split[:, None]).float()
    batch = {"ids": torch.randint(100, (2, 16)), "weights": weights, "prompt_tokens": split, "total": weights.sum()}
    with torch.autocast("cpu", torch.bfloat16):
        low = weighted_loss(model, batch)
    full = weighted_loss(model, batch)
    assert low.dtype is torch.float32
    assert low.item() == pytest.approx(full.item(), rel=0.02)
    got, wanted = gradients(model, low), gradients(model, full)
    name = "model.embed_tokens.weight"
    assert F.cosine_similarity(got[name].flatten(), wanted[name].flatten(), dim=0) > 0.99


def test_a_graph_is_walked_backwards_once() -> None:
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    value = loss.LinearCrossEntropy.apply(hidden, head, torch.arange(4), torch.ones(4))
    value.backward(retain_graph=True)
    with pytest.raises(AttributeError, match="gradients"):  # they were scaled in place
        value.backward()
