from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.gqa import Gqa
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, lstm, shape, write_checkpoint, write_variant

FAMILIES = {
    "llama": shape(kv_heads=4),
    "qwen2": shape(kv_heads=4, qkv_bias=True),
    "gemma": shape(kv_heads=4, **GEMMA),
}
TEXT = text()


def merged(tmp_path: Path, model: Decoder, kv_heads: int) -> Variant:
    parent = write_variant(tmp_path / "baseline", model)
    return make_variant(Gqa(kv_heads), parent, None, name="shared", target=tmp_path / "shared", seed=0)[0]


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_heads_that_are_alike_changes_no_logit(tmp_path: Path, family: str, kv_heads: int) -> None:
    model = decoder(FAMILIES[family])
    with torch.no_grad():
        for block in model.model.layers:
            for name in ("k_proj", "v_proj"):
                for value in block.self_attn.get_submodule(name).parameters():
                    heads = value.view(kv_heads, 4 // kv_heads, 8, -1)
                    heads.copy_(heads[:, :1].clone().expand_as(heads))
    variant = merged(tmp_path, model, kv_heads)
    assert load_network(variant).config.kv_heads == kv_heads
    with torch.inference_mode():
        torch.testing.assert_close(load_network(variant).eval()(TEXT.ids), model(TEXT.ids), rtol=1e-4, atol=1e-5)


def test_a_head_is_the_mean_of_those_it_stands_for(tmp_path: Path) -> None:
    model = decoder(FAMILIES["qwen2"])
    tensors = merged(tmp_path, model, 2).tensors()
    for kind in ("weight", "bias"):
        before = model.state_dict()[f"model.layers.1.self_attn.v_proj.{kind}"].double()
        after = tensors[f"model.layers.1.self_attn.v_proj.{kind}"].double()
        torch.testing.assert_close(after[8:], (before[16:24] + before[24:]) / 2, rtol=1e-6, atol=1e-7)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(tensors[name], model.state_dict()[name])


def test_it_runs_opens_in_transformers_and_can_be_quantised(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    variant = merged(tmp_path, decoder(FAMILIES["gemma"]), 1)
    child, _ = make_variant(Rtn(), variant, None, name="int8", target=tmp_path / "int8", seed=0)
    for one in (variant, child):
        assert len(list(Eager(threads=1).load(one, tmp_path).submit(Request(0, (5, 6), 4)))) == 4
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(variant.path).eval()(TEXT.ids).logits
        torch.testing.assert_close(load_network(variant).eval()(TEXT.ids), theirs, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compression\.kv_heads must be at least 1, got 0"):
        Gqa(0)
    parent = write_variant(tmp_path / "baseline", decoder(FAMILIES["llama"]))
    for given in (3, 4):
        with pytest.raises(UserError, match=f"must divide the parent's 4 and be less, got {given}"):
            Gqa(given).compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match="gqa needs a float parent"):
        Gqa().compress(quantised, None, 0)
    with pytest.raises(UserError, match="gqa is for decoders"):
        Gqa().compress(write_checkpoint(tmp_path / "lstm", lstm()), None, 0)
