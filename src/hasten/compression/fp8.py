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
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Checkpoint
from hasten.compression.base import Calibration, Compressed, Compressor
from hasten.compression.shared.quantiser import is_linear

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 448.0
"""Of E4M3."""
SMALLEST_SCALE = 2.0**-100
"""Of a row of zeros; far above where bfloat16 ends."""


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
        from hasten.model.grid import Grid

        self.refuse_quantised(parent)
        config, tensors = dict(parent.config), parent.tensors()
        if self.head and config.get("tie_word_embeddings"):
            config["tie_word_embeddings"] = False
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for name, weight in list(tensors.items()):
            if is_linear(name) and (self.head or name != "lm_head.weight"):
                scale = nearest_scale(weight)
                tensors[name], tensors[f"{name}_scale"] = rounded(weight, scale), scale
        config["quantization_config"] = quantization_config([] if self.head else ["lm_head"], self.activations)
        return Compressed(config, tensors, Grid(8, 0, type="float"))


def nearest_scale(weight: Tensor) -> Tensor:
    """Scales that bfloat16 holds, for which each row's largest magnitude is 448: (out, in) -> (out, 1) float32."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    return (largest / LARGEST).bfloat16().float().clamp(min=SMALLEST_SCALE)


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """The nearest E4M3 numbers, half to even: weight (out, in), scale (out, 1) -> (out, in) float8_e4m3fn."""
    import torch

    return (weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def quantization_config(ignore: list[str], activations: bool) -> dict[str, Any]:
    """`quantization_config` for `config.json`, as compressed-tensors writes it."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**number, "strategy": "channel", "dynamic": False, "observer": "minmax"}
    inputs = {**number, "strategy": "token", "dynamic": True} if activations else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
