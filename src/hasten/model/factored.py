"""A linear layer as a product of two thin ones, and a decoder that has some (`hasten.model.low_rank_config`)."""

from __future__ import annotations

from torch import Tensor, nn

from hasten.model.decoder import Decoder
from hasten.model.low_rank_config import LowRankConfig


class Factored(nn.Module):
    """y = out_proj(in_proj(x)), (..., in) -> rank -> out; the bias is the second's.

    Both are called `_proj`, as every matrix that compression treats.
    """

    def __init__(self, columns: int, rank: int, rows: int, bias: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(columns, rank, bias=False)
        self.out_proj = nn.Linear(rank, rows, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_proj(self.in_proj(x))
        return out


def factored(config: LowRankConfig) -> Decoder:
    """A decoder of that shape, weights not yet set."""
    model = Decoder(config)
    for name, rank in config.ranks.items():
        place, _, kind = name.rpartition(".")
        whole = model.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        thin = Factored(whole.in_features, rank, whole.out_features, whole.bias is not None)
        setattr(model.get_submodule(place), kind, thin)
    return model
