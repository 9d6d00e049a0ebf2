"""Scales on a matrix's inputs, hidden in what makes those inputs: the network computes the same.

Multiply column j of a matrix by s_j and divide what arrives there by s_j, and nothing changes, except what rounding
does: of its group, the column that is larger loses a smaller share of itself. The division costs nothing where the
inputs come from a norm (its weights take it) or, through sums and products alone, from another matrix (its rows do):

    norm -> queries, keys, values        values -> output matrix     if every query head has its own values
    norm -> gate, up                     up -> down

With fewer heads of values than of queries a row of the values feeds several columns, and those are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from hasten.compression.shared.layerwise import Group
from hasten.model.decoder import Block, Norm


def source(group: Group) -> Norm | nn.Linear | None:
    """What makes a group's inputs and can take a scale, or None."""
    block = group.block
    if not isinstance(block, Block):
        return None  # the head
    kind = group.names[0].rsplit(".", 1)[-1]
    if kind == "q_proj":
        return block.input_layernorm
    if kind == "gate_proj":
        return block.pre_feedforward_layernorm if block.post_norms else block.post_attention_layernorm
    if kind == "down_proj":
        return block.mlp.up_proj
    values, output = block.self_attn.v_proj, block.self_attn.o_proj
    return values if values.out_features == output.in_features else None


def fold(source: Norm | nn.Linear, linears: Iterable[nn.Linear], scale: Tensor) -> None:
    """Multiply the matrices' columns by the scale (in,), and divide what comes from the source by it."""
    scale = scale.float()
    for linear in linears:
        linear.weight.mul_(scale)
    if isinstance(source, nn.Linear):
        source.weight.div_(scale[:, None])
        if source.bias is not None:
            source.bias.div_(scale)
    else:
        offset = 1 if source.offset else 0
        source.weight.copy_((source.weight + offset) / scale - offset)
