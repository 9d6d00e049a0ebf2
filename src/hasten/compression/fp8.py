"""FP8: weights as 8-bit floats (E4M3), a scale for each row, for GPUs that multiply them.

Four bits of exponent and three of mantissa (Micikevicius et al. 2022, arXiv:2209.05433): a number is right to within a
sixteenth wherever it lies between 2^-6 and 448, where 8-bit integers have the same step everywhere. So an outlier costs
its row little, and rounding to nearest is all there is to it: s = max|w| / 448, w ~ s q. Against bfloat16 a token reads
half the bytes; with `activations`, inputs are rounded to E4M3 as well, a scale for each token found as it comes, and
the tensor cores of a Hopper or Ada multiply twice as fast: prompts and batches feel that, a single stream does not.

It is stored as compressed-tensors' `float-quantized`: `<name>.weight` (float8_e4m3fn) and `<name>.weight_scale`
(out, 1). vLLM multiplies those; no processor does, so CPU engines refuse it, and `eager` and `transformers` widen it.

    python pipelines/compress.py plan=default name=fp8 parent=variants/baseline compression=fp8
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.compression.shared.quantiser import is_linear, untied

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
"""Of E4M3."""
SMALLEST_SCALE = 2.0**-100
"""Of a row of zeros; far above where bfloat16 ends."""
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
"""What compressed-tensors calls a scale for each token, found as it comes."""


@dataclass
class Fp8(Compressor):
    """activations: say that inputs are to be rounded too, with a scale for each token. head: the output matrix too;
    a tied one is untied by that: the embedding stays as it is.
    """

    activations: bool = False
    head: bool = True

    grids: ClassVar[str] = "8-bit floats (E4M3), a scale for each row"

    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Round every linear layer. Raises `UserError` on a quantised parent."""
        from hasten.model.grid import Grid, by_rows, quantization_config

        config, stored = untied(self, parent, head=self.head)
        tensors: dict[str, Tensor] = {}
        for name, weight in stored.items():
            if is_linear(name) and (self.head or name != "lm_head.weight"):
                scale = by_rows(nearest_scale, weight)
                tensors[name], tensors[f"{name}_scale"] = by_rows(rounded, weight, scale), scale
            else:
                tensors[name] = weight
        grid = Grid(8, 0, type="float")
        found = quantization_config(grid, [] if self.head else ["lm_head"])
        found["config_groups"]["group_0"]["input_activations"] = INPUTS if self.activations else None
        return Compressed({**config, "quantization_config": found}, tensors, grid)


def nearest_scale(weight: Tensor) -> Tensor:
    """Scales that bfloat16 holds, for which each row's largest magnitude is 448: (out, in) -> (out, 1) float32."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    return (largest / LARGEST).bfloat16().float().clamp(min=SMALLEST_SCALE)


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest E4M3 numbers, half to even: weight (out, in), scale (out, 1) -> (out, in) float8_e4m3fn."""
    import torch

    return (weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
