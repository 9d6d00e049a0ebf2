"""Where a matrix can be cut: the linear algebra of `hasten.compression.low_rank`.

With G = X^T X = R R^T, R symmetric, the squared length of X D^T is that of D R, whatever the matrix D. So the best U V
for X is the best for W R read backwards, and what a rank loses is the sum of the squared singular values beyond it.
They are the eigenvalues of W G W^T, or of (W R)^T W R where that is smaller: a matrix's shorter side is all that is
solved for.
"""

from __future__ import annotations

from functools import cached_property

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
        seen = Seen(inputs.gram)
        for name, linear in named:
            self.energies[name] = spectrum(linear.weight.double(), seen)[0]


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
        seen = Seen(inputs.gram)
        for name, linear in named:
            outer, inner, lost = cut(linear.weight.double(), seen, self.ranks[name])
            self.factors[name], self.errors[name] = (outer.float(), inner.float()), round(lost, 6)
            linear.weight.copy_(outer @ inner)


class Seen:
    """What a group was given: gram, G (in, in), symmetric and without negative directions but for rounding."""

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram

    @cached_property
    def root(self) -> Tensor:
        """R with R R = G."""
        values, vectors = torch.linalg.eigh(self.gram)
        root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return root


def spectrum(weight: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """Squared singular values of W R, falling, (k,), and what they belong to, (out, k), each column scaled in its own
    way; k is the smaller of out and in.
    """
    if len(weight) <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(weight @ seen.gram @ weight.T)
    else:
        product = weight @ seen.root
        values, vectors = torch.linalg.eigh(product.T @ product)
        vectors = product @ vectors
    return values.flip(0).clamp(min=0), vectors.flip(1)


def cut(weight: Tensor, seen: Seen, rank: int) -> tuple[Tensor, Tensor, float]:
    """U (out, r), V (r, in) and the share of ||W R||^2 that W - U V loses."""
    energy, directions = spectrum(weight, seen)
    # Columns of length one, at right angles even where nothing is left to say.
    outer = torch.linalg.qr(directions[:, :rank]).Q.contiguous()
    whole = float(energy.sum())
    return outer, outer.T @ weight, float(energy[rank:].sum()) / whole if whole else 0.0
