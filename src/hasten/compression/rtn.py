"""Round to nearest: the quantiser every other one has to beat.

For each group of `group_size` neighbouring weights the scale spreads the largest magnitude over the
grid, s = max|w| / ((2^b - 1) / 2), and every weight goes to its nearest grid point (Nagel et al.
2021, arXiv:2106.08295). Decoding reads 4 to 8 times fewer weight bytes, which is where the speed
comes from; the error is about half a step per weight at most (the largest may be clipped by
a little more), which 8 bits hide and 4 bits may not.

Try it: python pipelines/sweep.py -m compression=rtn compression.bits=4,8 engine=eager,llamacpp
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.errors import UserError, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.grid import Grid


@dataclass
class Rtn(Compressor):
    """bits: 4 or 8. group_size: weights that share a scale, 0 means a whole row. head: quantise the output matrix too.

    A tied head is untied by quantising it: the embedding stays float, the head becomes integers.
    """

    bits: int = 8
    group_size: int = 32
    symmetric: bool = True
    head: bool = True

    grids: ClassVar[str] = "4 or 8 bits, any group size that divides the widths, symmetric"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise one_of("compression.bits", self.bits, [4, 8])
        if self.group_size < 0:
            raise UserError(f"compression.group_size must be 0 (whole row) or more, got {self.group_size}")
        if not self.symmetric:
            raise UserError("compression.symmetric must be true, got False: no engine runs an asymmetric grid natively")

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Quantise every linear layer. Raises `UserError` on a quantised parent or a width that does not fit."""
        from hasten.model.grid import Grid, quantise, quantised_names, quantization_config, stored

        tensors = parent.tensors()
        if quantised_names(tensors):
            raise UserError(f"rtn needs a float parent, got {parent.path} which is already quantised")
        grid = Grid(self.bits, self.group_size, self.symmetric)
        config: dict[str, Any] = dict(parent.config)
        if self.head and config.get("tie_word_embeddings"):
            config["tie_word_embeddings"] = False
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        result: dict[str, Tensor] = {}
        for name, weight in tensors.items():
            if is_linear(name) and (self.head or name != "lm_head.weight"):
                scale = nearest_scale(weight, grid)
                result.update(stored(name.removesuffix(".weight"), quantise(weight, scale, grid), scale, grid))
            else:
                result[name] = weight
        config["quantization_config"] = quantization_config(grid, ignore=[] if self.head else ["lm_head"])
        return Compressed(config, result, grid)


def is_linear(name: str) -> bool:
    """Whether a checkpoint tensor is a linear layer's matrix (not an embedding, not a norm)."""
    return name.endswith(("_proj.weight", "lm_head.weight"))


def nearest_scale(weight: Tensor, grid: Grid) -> Tensor:
    """Scales that spread each group's largest magnitude over the grid: (out, in) -> (out, groups) float32."""
    from hasten.model.grid import portable_scale

    out, columns = weight.shape
    largest = weight.float().view(out, grid.groups(columns), -1).abs().amax(dim=-1)
    return portable_scale(largest / ((grid.highest - grid.lowest) / 2))
