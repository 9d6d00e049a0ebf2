from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from hasten.compression.shared.folding import fold, source
from hasten.compression.shared.layerwise import Group, groups
from hasten.model.decoder import Block, Decoder
from tests.compression.texts import text
from tests.tiny import GEMMA, decoder, shape

SHAPES = {
    "llama": shape(),  # two query heads to a key/value head
    "heads match": shape(kv_heads=4),
    "biases": shape(kv_heads=4, qkv_bias=True, mlp_bias=True, output_bias=True),
    "gemma": shape(layers=3, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"], **GEMMA),
}


def folded(model: Decoder) -> list[str]:
    """Fold random scales wherever they go; which groups took one."""
    generator, taken = torch.Generator().manual_seed(3), []
    for group in groups(model, head=True):
        before = source(group)
        if before is not None:
            scale = torch.exp(torch.randn(group.linears[0].in_features, generator=generator))
            with torch.no_grad():
                fold(before, group.linears, scale)
            taken.append(group.names[0].rsplit(".", 1)[-1])
    return taken


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["q_proj", "gate_proj", "down_proj"]),
        ("heads match", ["q_proj", "o_proj", "gate_proj", "down_proj"]),
        ("biases", ["q_proj", "o_proj", "gate_proj", "down_proj"]),
        ("gemma", ["q_proj", "gate_proj", "down_proj"]),
    ],
)
def test_folding_changes_every_matrix_and_no_logit(family: str, expected: Sequence[str]) -> None:
    model, ids = decoder(SHAPES[family]), text().ids
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids)
        assert folded(model) == list(expected) * model.config.layers
        torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-4)
    touched = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    for kind in expected:
        assert any(name.endswith(f"{kind}.weight") for name in touched)
    assert "model.embed_tokens.weight" not in touched
    assert "model.norm.weight" not in touched


def test_what_takes_a_scale_is_what_makes_the_inputs() -> None:
    block = decoder(SHAPES["gemma"]).model.layers[1]
    assert isinstance(block, Block)

    def of(name: str) -> nn.Module | None:
        return source(Group((f"model.layers.1.{name}",), (block.get_submodule(name),), block))  # type: ignore[arg-type]

    assert of("self_attn.q_proj") is block.input_layernorm
    assert of("mlp.gate_proj") is block.pre_feedforward_layernorm
    assert of("mlp.down_proj") is block.mlp.up_proj
    assert of("self_attn.o_proj") is None  # fewer value heads than query heads
    assert source(Group(("lm_head",), (nn.Linear(2, 2),))) is None
