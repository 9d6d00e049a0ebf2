"""Where a matrix can be cut: the linear algebra of `hasten.compression.low_rank`.

With G = X^T X = R R^T, R symmetric, the squared length of X D^T is that of D R, whatever the matrix D. So the best U V
for X is the best for W R read backwards, and what a rank loses is the sum of the squared singular values beyond it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.compression.shared.layerwise import Group, Inputs, Summing


class Spectra(Summing):
    """Only looks. energies: by matrix, its outputs' squared singular values, falling."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.energies: dict[str, Tensor] = {}

    def settle(self, group: Group, inputs: Inputs) -> None:
        named = [pair for pair in zip(group.names, group.linears, strict=True) if pair[0] in self.names]
        if not named:
            return
        root = square_root(inputs.gram)
        for name, linear in named:
            self.energies[name] = torch.linalg.svdvals(linear.weight.double() @ root).square()


class Cutting(Summing):
    """Gives matrices their rank. factors: by matrix, (out, r) and (r, in). errors: the share of its outputs it lost."""

    def __init__(self, ranks: dict[str, int]) -> None:
        self.ranks = ranks
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.errors: dict[str, float] = {}

    def settle(self, group: Group, inputs: Inputs) -> None:
        named = [pair for pair in zip(group.names, group.linears, strict=True) if pair[0] in self.ranks]
        if not named:
            return
        root = square_root(inputs.gram)
        for name, linear in named:
            outer, inner, lost = cut(linear.weight.double(), root, self.ranks[name])
            self.factors[name], self.errors[name] = (outer.float(), inner.float()), round(lost, 6)
            linear.weight.copy_(outer @ inner)


def square_root(gram: Tensor) -> Tensor:
    """R with R R = G, for G (in, in) symmetric and without negative directions but for rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def cut(weight: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """U (out, r), V (r, in) and the share of ||W R||^2 that W - U V loses."""
    left, values, _ = torch.linalg.svd(weight @ root, full_matrices=False)
    outer, energy = left[:, :rank].contiguous(), values.square()
    whole = float(energy.sum())
    return outer, outer.T @ weight, float(energy[rank:].sum()) / whole if whole else 0.0
