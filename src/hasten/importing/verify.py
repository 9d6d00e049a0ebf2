"""Does an imported checkpoint compute what its makers' code computes? Asked of transformers, on random tokens.

Parity over every family and many shapes is what the tests show; this shows it of the very checkpoint a study starts
from, whose config.json may hold what no test thought of.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import Checkpoint
from hasten.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-3
"""The largest difference between two logits, as a share of the largest logit: float32 sums in another order stay far
below it, another formula does not.
"""


def logit_difference(source: Path, imported: Path, tokens: int, seed: int = 0) -> float:
    """The largest difference between our logits and transformers', in float32, over the largest logit.

    source: the checkpoint as it came. imported: what was made of it. One model is in memory at a time. Raises
    `UserError` if transformers cannot open the source, or beyond `TOLERANCE`.
    """
    import torch

    from hasten.model.huggingface import load_network

    network = load_network(Checkpoint(imported)).eval()
    length = min(tokens, network.config.context)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(network.config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        ours = network(ids)  # (1, T, V)
    del network
    gc.collect()
    theirs = _theirs(source, ids)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(
            f"its logits differ from those of transformers by {difference:.2g} of the largest, more than {TOLERANCE}: "
            "hasten does not compute this checkpoint; model.verify_tokens=0 would import it all the same"
        )
    return difference


def _theirs(source: Path, ids: Tensor) -> Tensor:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(source), dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
        with torch.inference_mode():
            logits: Tensor = model.eval()(ids).logits.float()
    except Exception as error:  # it raises errors of every kind
        raise UserError(
            f"transformers cannot open it, so nothing can be compared (model.verify_tokens=0 imports it all the same): "
            f"{error}"
        ) from None
    return logits
