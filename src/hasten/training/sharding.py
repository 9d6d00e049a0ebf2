"""How a network's weights are spread over processes, and how they come together again.

Tensor parallelism splits a block's first matrices by rows and its last ones by columns, so that a half of a block needs
one sum over the processes on the way forward (Shoeybi et al. 2019, arXiv:1909.08053); embedding, head and norms are
whole everywhere. FSDP then gives every process a part of whatever is left whole, block by block (Zhao et al. 2023,
arXiv:2304.11277).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import UserError
from hasten.model.network import Network

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""What Lightning calls the two directions of the grid of processes."""


def refuse_unsplittable(config: Any, tensor: int) -> None:
    """Raises `UserError` if `tensor` processes cannot share the matrices of a network of that shape."""
    if tensor == 1:
        return
    if not hasattr(config, "kv_heads"):
        raise UserError(
            "training.strategy must be single, ddp or fsdp for an LSTM, whose steps follow one another and would wait "
            f"for a sum over processes at every token, got {tensor} processes to a matrix"
        )
    for name in ("heads", "kv_heads", "feed_forward_size"):
        if getattr(config, name) % tensor:
            raise UserError(
                f"training.tensor_parallel must divide model.{name} ({getattr(config, name)}), got {tensor}"
            )


def split(model: Network, mesh: DeviceMesh) -> None:
    """Spread the matrices of every block over the tensor direction of `mesh`."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    for block in model.blocks():
        rows, columns = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        plan: dict[str, ParallelStyle] = {f"self_attn.{name}": ColwiseParallel() for name in rows}
        plan |= {f"mlp.{name}": ColwiseParallel() for name in columns}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        if model.config.head_norm:  # one weight for all heads: its gradient is the sum over those of all processes
            heads = 1  # the dimension of (B, H, T, D) that is split
            plan |= {
                f"self_attn.{name}": SequenceParallel(sequence_dim=heads, use_local_output=True)
                for name in ("q_norm", "k_norm")
            }
        parallelize_module(block, mesh, plan)


def shard(model: Network, mesh: DeviceMesh) -> None:
    """Give every process along `mesh` a part of every weight; a block's are gathered when it is its turn."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # the loss does not go through `forward`


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, in one piece. All of them have to ask for it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state on the CPU of rank 0, and nothing elsewhere. All processes have to ask for it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(state)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that their common norm is at most `limit`; the norm before, () float32.

    Weights may be spread over different processes, so the norm is put together from groups that are spread alike.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[getattr(parameter.grad, "device_mesh", None)].append(parameter.grad)
    norms = [whole(torch.nn.utils.get_total_norm(gradients)) for gradients in groups.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if math.isfinite(limit):
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradients in groups.values():
            torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or the tensor if it is not spread."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
