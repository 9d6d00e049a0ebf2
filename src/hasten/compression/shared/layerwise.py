"""Layer by layer: treat a decoder's matrices in the order in which data passes them.

What a matrix should keep is told by what it is given. A method that looks at inputs therefore goes through the blocks
from the first to the last: the calibration text's states before a block are run through it, each matrix sees its inputs
(`Treatment.see`), is treated (`Treatment.treat`), and the states after the block are those that the treated block
makes, so that later matrices answer for what earlier ones lost. Within a block, too, queries, keys and values are
treated before the output matrix sees its inputs, and so on ("true sequential"; Frantar et al. 2022, arXiv:2210.17323,
and its code). In memory are the network, one group's statistics and the states, (N, T, hidden).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.compression.base import Calibration
    from hasten.model.decoder import Decoder, View

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A block's matrices in the order of the data; those of a group are given the same inputs."""
ROWS = 8
"""Calibration rows that pass a block at once."""


@dataclass(frozen=True)
class Group:
    """Matrices that see the same inputs. block: what they are part of; None for the head."""

    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    block: nn.Module | None = None


class Treatment(ABC):
    """What a method does to each group."""

    @abstractmethod
    def see(self, x: Tensor) -> None:
        """Some more inputs of the group that is treated next: (tokens, in) float32, without padding."""

    @abstractmethod
    def treat(self, group: Group) -> None:
        """Change the weights in place, and forget what was seen."""


@dataclass
class Keeping(Treatment):
    """Another treatment, and what it made of each matrix, by tensor name: that outlives the network."""

    treatment: Treatment
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, x: Tensor) -> None:
        self.treatment.see(x)

    def treat(self, group: Group) -> None:
        self.treatment.treat(group)
        for name, linear in zip(group.names, group.linears, strict=True):
            self.weights[f"{name}.weight"] = linear.weight.detach()


@dataclass
class Inputs:
    """Sums over what a group is given. gram: x^T x, (in, in). magnitude: mean |x|, largest: max |x|, (in,); float64."""

    gram: Tensor
    magnitude: Tensor
    largest: Tensor


class Summing(Treatment):
    """Looks at inputs through their sums alone: a group's memory is (in, in), however long the text."""

    _tokens = 0
    _sums: Inputs

    def see(self, x: Tensor) -> None:
        width, sized = x.shape[1], x.abs()
        if not self._tokens:
            zeros = torch.zeros(width, dtype=torch.float64)
            self._sums = Inputs(zeros.new_zeros(width, width), zeros, zeros.clone())
        self._tokens += len(x)
        self._sums.gram += x.T @ x
        self._sums.magnitude += sized.sum(0, dtype=torch.float64)
        if len(x):
            self._sums.largest = torch.maximum(self._sums.largest, sized.amax(0).double())

    def treat(self, group: Group) -> None:
        sums, tokens, self._tokens = self._sums, self._tokens, 0
        del self._sums  # before the next group's
        sums.magnitude /= tokens
        if not torch.isfinite(sums.gram).all():
            raise UserError(f"the calibration text must make finite inputs, got others for {group.names[0]}")
        self.settle(group, sums)

    @abstractmethod
    def settle(self, group: Group, inputs: Inputs) -> None:
        """Change the weights in place."""


def groups(model: Decoder, *, head: bool) -> list[Group]:
    """Every group of a network in the order of the data; the head last, if it is asked for."""
    found = [
        Group(tuple(f"model.layers.{number}.{name}" for name in names), linears(block, names), block)
        for number, block in enumerate(model.model.layers)
        for whole in GROUPS
        for names in parts(block, whole)
    ]
    return [*found, Group(("lm_head",), (model.lm_head,))] if head else found


def parts(block: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The same matrices, factored ones as two: the first sees what the whole one would, the second what that makes."""
    from hasten.model.factored import Factored

    factored = [name for name in names if isinstance(block.get_submodule(name), Factored)]
    yield tuple(f"{name}.in_proj" if name in factored else name for name in names)
    yield from ((f"{name}.out_proj",) for name in factored)


def linears(block: nn.Module, names: Sequence[str]) -> tuple[nn.Linear, ...]:
    """A block's matrices by name."""
    found = tuple(block.get_submodule(name) for name in names)
    assert all(isinstance(module, nn.Linear) for module in found)
    return cast("tuple[nn.Linear, ...]", found)


@torch.no_grad()
def walk(
    model: Decoder, calibration: Calibration, treatment: Treatment, *, head: bool = False, last: bool = False
) -> None:
    """Show every group its inputs and treat it, block by block; the head at last, if it is asked for.

    last: nobody needs the network afterwards, so what is done is given back: each block, embedding and head.
    """
    rows = [slice(start, start + ROWS) for start in range(0, len(calibration.ids), ROWS)]
    real = calibration.documents >= 0  # (N, T)
    states = torch.cat([model.model.embed(calibration.ids[part]) for part in rows])  # (N, T, hidden)
    if last:
        model.model.embed_tokens.to("meta")  # one that is tied to the head stays as long as that does
        if not head:
            model.lm_head.to("meta")
    by_block: dict[int, list[Group]] = {}
    for group in groups(model, head=False):
        by_block.setdefault(id(group.block), []).append(group)
    for block, slides in zip(model.model.layers, model.model.slides, strict=True):
        views = [view(model, calibration, part, slides) for part in rows]
        for group in by_block[id(block)]:
            for part, seen in zip(rows, views, strict=True):
                with shown(group.linears[0], treatment, real[part]):
                    block(states[part], seen, None)
            treatment.treat(group)
        for part, seen in zip(rows, views, strict=True):
            states[part] = block(states[part], seen, None)
        if last:
            block.to("meta")
    if head:
        for part in rows:
            treatment.see(model.model.norm(states[part])[real[part]])
        treatment.treat(groups(model, head=True)[-1])


def view(model: Decoder, calibration: Calibration, part: slice, slides: bool) -> View:
    """What a layer attends to in these rows."""
    return model.model.view(calibration.ids[part], 0, None, slides, calibration.documents[part])


class ReachedError(Exception):
    """A pass came to the module whose inputs were asked for: what follows would be computed for nothing."""


@contextmanager
def shown(module: nn.Module, treatment: Treatment, real: Tensor) -> Iterator[None]:
    """Let the treatment see what the module is given, and end the pass there. real: (N, T), what is no padding."""

    def hook(module: nn.Module, args: Sequence[Tensor]) -> None:
        treatment.see(args[0][real])
        raise ReachedError

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    except ReachedError:
        pass
    finally:
        handle.remove()
