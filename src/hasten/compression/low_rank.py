"""Low rank: a matrix as the product of two thin ones, cut where its outputs on the calibration text miss least.

A matrix (out, in) of rank r is U V, (out, r) times (r, in): r (out + in) weights to read instead of out * in, fewer
where r is below out * in / (out + in), half the width of a square matrix. Trained matrices are not of low rank, but
what they are given is uneven, so that much of what they could say is never said. With X the text's inputs, the
product of rank r that keeps ||X (W - U V)^T|| smallest is a projection: U are the first r left singular vectors P of
W (X^T X)^1/2 and V = P^T W (Eckart and Young 1936, https://doi.org/10.1007/BF02288367). That is SVD-LLM's truncation
(Wang et al. 2024, arXiv:2403.07378; ASVD, arXiv:2312.05821, before it) without its Cholesky factor's inverse, so inputs
that the text never uses need no damping. Layers are taken in sequence, on what the cut ones before them make.

`error` gives each matrix the rank that it needs: steps of `multiple_of` go to whichever matrix they spare the largest
share of its outputs per weight. Spectra fall slowly: at half the weights expect to train again (`distill`), then round.

    python pipelines/compress.py plan=default name=thin parent=variants/baseline compression=low_rank \\
        compression.keep=0.7 compression.which=mlp
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.compression.shared.truncation import Cutting, Spectra
    from hasten.model.decoder import Decoder

Sizes = dict[str, tuple[int, int]]
"""(out, in) of matrices by name."""


class Which(Enum):
    """Matrices of the blocks."""

    attention = "self_attn"
    mlp = "mlp"
    all = "model.layers"


class Allocation(Enum):
    """uniform: every matrix keeps the same share of its weights. error: those that need more keep more."""

    uniform = "uniform"
    error = "error"


@dataclass
class LowRank(Compressor):
    """keep: the share of the weights of the matrices in question that is left, above 0 and below 1.

    which: attention, mlp or all of the blocks' matrices. allocation: uniform or error. activations: look at what flows
    through the network; false cuts by the weights alone, which needs no text. multiple_of: of every rank, what kernels
    and grids want.
    """

    keep: float = 0.7
    which: Which = Which.all
    allocation: Allocation = Allocation.error
    activations: bool = True
    multiple_of: int = 32

    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UserError(f"compression.keep must lie between 0 and 1, got {self.keep}")
        if self.multiple_of < 1:
            raise UserError(f"compression.multiple_of must be at least 1, got {self.multiple_of}")
        if not self.activations:
            self.needs = "nothing"  # type: ignore[misc]

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Factor matrices. Raises `UserError` on a quantised or factored parent, or if no rank saves anything."""
        from hasten.compression.shared.truncation import Cutting
        from hasten.model.low_rank_config import factored_json, matrix_sizes

        text, model = self.given(calibration) if self.activations else None, self.network(parent)
        sizes = {name: size for name, size in matrix_sizes(model.config).items() if f"{self.which.value}." in name}
        ranks = self.ranks(model, text, sizes)
        work = Cutting(ranks)
        look(model, text, work, last=True)
        del model  # what stays whole comes from the parent's file
        tensors = parent.tensors()
        for name, (outer, inner) in work.factors.items():
            dtype = tensors.pop(f"{name}.weight").dtype
            tensors[f"{name}.in_proj.weight"], tensors[f"{name}.out_proj.weight"] = inner.to(dtype), outer.to(dtype)
            if f"{name}.bias" in tensors:
                tensors[f"{name}.out_proj.bias"] = tensors.pop(f"{name}.bias")
        left = sum(weights(sizes[name], ranks.get(name)) for name in sizes)
        kept = round(left / sum(weights(size) for size in sizes.values()), 6)
        return Compressed(factored_json(parent.config, ranks), tensors, None, {"kept": kept, "errors": work.errors})

    def ranks(self, model: Decoder, text: Calibration | None, sizes: Sizes) -> dict[str, int]:
        """Of the matrices that are factored. Raises `UserError` if `multiple_of` is more than any can have."""
        from hasten.compression.shared.truncation import Spectra

        if self.allocation is Allocation.uniform:
            found = {name: self.step_below(self.keep * size[0] * size[1] / sum(size)) for name, size in sizes.items()}
            if not all(found.values()):
                raise UserError(
                    f"compression.multiple_of must be at most the rank that compression.keep={self.keep:g} leaves of "
                    f"every matrix, got {self.multiple_of} for {next(name for name in found if not found[name])}"
                )
            return found
        spectra = Spectra(set(sizes))
        look(model, text, spectra)
        found = allotted(spectra.energies, sizes, self.keep, self.multiple_of)
        if not found:
            raise UserError(
                f"compression.keep must leave each matrix a rank of {self.multiple_of} (compression.multiple_of) "
                f"that saves weights, got {self.keep:g}"
            )
        return found

    def step_below(self, rank: float) -> int:
        return int(rank + 1e-9) // self.multiple_of * self.multiple_of


def weights(size: tuple[int, int], rank: int | None = None) -> int:
    """How many a matrix has: whole, or in two of that rank."""
    return rank * sum(size) if rank else size[0] * size[1]


def look(model: Decoder, text: Calibration | None, work: Cutting | Spectra, *, last: bool = False) -> None:
    """Take every matrix on what it is given; without text, on inputs that are all alike. last: as of `walk`."""
    import torch

    from hasten.compression.shared.layerwise import Inputs, groups, walk

    if text is not None:
        walk(model, text, work, last=last)
        return
    with torch.no_grad():
        for group in groups(model, head=False):
            ones = torch.ones(group.linears[0].in_features, dtype=torch.float64)
            work.settle(group, Inputs(ones.diag(), ones, ones))
            if last:
                for linear in group.linears:
                    linear.to("meta")


def allotted(energies: dict[str, Tensor], sizes: Sizes, keep: float, step: int) -> dict[str, int]:
    """Ranks chosen greedily, each matrix's loss a share of its outputs' energy, for at most `keep` of the weights.

    energies: squared singular values, falling. Every matrix starts at one step; further ones go where they spare most
    per weight. The last step of a matrix, beyond which two would be no fewer weights than one, leaves it whole.
    """
    budget = keep * sum(weights(size) for size in sizes.values())
    spent, ranks = 0, dict[str, int]()
    offers: list[tuple[float, int, int, str, int, int]] = []
    for place, (name, size) in enumerate(sizes.items()):
        shares, worth = energies[name] / energies[name].sum().clamp(min=1e-300), float("inf")
        most = (weights(size) - 1) // sum(size) // step * step
        if not most:
            spent += weights(size)  # no rank saves anything: it stays whole
            continue
        ranks[name], spent = step, spent + weights(size, step)
        for rank in range(step, most + 1, step):
            whole = rank == most
            end, cost = (len(shares), weights(size) - weights(size, rank)) if whole else (rank + step, step * sum(size))
            worth = min(worth, float(shares[rank:end].sum()) / cost)  # never before the step that it follows
            offers.append((-worth, place, rank, name, 0 if whole else end, cost))
    if spent > budget:
        return {}
    for _, _, _, name, rank, cost in sorted(offers):
        if spent + cost > budget:
            break
        ranks[name], spent = rank, spent + cost
    return {name: rank for name, rank in ranks.items() if rank}
