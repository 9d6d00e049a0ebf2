"""Does an imported checkpoint compute what its makers' code computes? Asked of transformers, on random tokens.

Parity over every family and many shapes is what the tests show; this shows it of the very checkpoint a study starts
from, whose config.json may hold what no test thought of. A few dozen tokens do not show what only long texts need: by
how much the slow pairs of a head turn, how far a wide window reaches. These are compared layer by layer; and where a
window is narrow enough, the text is longer than it.
"""

from __future__ import annotations

import gc
from math import isclose, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.artifacts import Checkpoint
from hasten.errors import UserError
from hasten.importing.weights import Stored

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.decoder import Decoder

TOLERANCE = 1e-3
"""The largest difference between two logits, as a share of the largest logit: float32 sums in another order stay far
below it, another formula does not.
"""
BEYOND = 64
"""How many tokens more than a window the text has, if that makes no more than `LONGEST`."""
LONGEST = 1024
WITHOUT = "model.verify_tokens=0 imports it all the same"


class Attends(NamedTuple):
    """How one layer attends. angles: sin of what each pair turns per position, (D / 2,), below a quarter turn.

    window: tokens that it sees, 0 for all of the context.
    """

    angles: Tensor
    window: int
    scale: float


def check_memory(stored: dict[str, Stored], vocab_size: int, tokens: int) -> None:
    """Raises `UserError` if a float32 copy of these weights and what is computed with it will not fit."""
    import psutil

    needed = 5 * sum(prod(one.shape) for one in stored.values()) + 16 * tokens * vocab_size
    free = int(psutil.virtual_memory().available)
    if needed > free:
        raise UserError(
            f"comparing it with transformers takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"{WITHOUT}"
        )


def logit_difference(source: Path, imported: Path, tokens: int, seed: int = 0) -> float:
    """The largest difference between our logits and transformers', in float32, over the largest logit.

    source: the checkpoint as it came. imported: what was made of it. tokens: how many logits, the last of the text. One
    model is in memory at a time. Raises `UserError` if transformers cannot open the source, if a layer attends
    otherwise there, or beyond `TOLERANCE`.
    """
    import torch

    from hasten.model.decoder import Decoder
    from hasten.model.huggingface import load_network

    network = load_network(Checkpoint(imported)).eval()
    assert isinstance(network, Decoder)
    config = network.config
    beyond = config.sliding_window + BEYOND if config.sliding_window else 0
    length = min(max(tokens, beyond if beyond <= LONGEST else 0), config.context)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        ours = network.lm_head(network.hidden(ids)[:, -tokens:])  # (1, tokens, V)
        our_layers = _our_layers(network)
    del network
    gc.collect()
    theirs, their_layers = _theirs(source, ids, min(tokens, length), config.context)
    _check_layers(our_layers, their_layers)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    if not difference <= TOLERANCE:  # NaN too
        raise UserError(
            f"its logits differ from those of transformers by {difference:.2g} of the largest, more than {TOLERANCE}: "
            f"hasten does not compute this checkpoint; {WITHOUT}"
        )
    return difference


def _our_layers(network: Decoder) -> list[Attends]:
    import torch

    config, stack = network.config, network.model
    found = []
    for slides in stack.slides:
        angles = stack.view(torch.zeros(1, 1, dtype=torch.long), 1, None, slides).sin  # (1, D): those of position 1
        window = config.sliding_window if slides and config.sliding_window < config.context else 0
        found.append(Attends(angles[0, : config.head_width // 2], window, config.score_scale))
    return found


def _their_layers(model: Any, context: int) -> list[Attends]:
    """The same of one of transformers' decoders. A Mistral slides if its config says so, the others layer by layer."""
    rotary, found = model.model.rotary_emb, []
    for layer in model.model.layers:
        attention = layer.self_attn
        kind = f"{attention.layer_type}_" if hasattr(rotary, f"{getattr(attention, 'layer_type', '')}_inv_freq") else ""
        angles = getattr(rotary, f"{kind}inv_freq").sin() * getattr(rotary, f"{kind}attention_scaling")
        window = getattr(attention, "sliding_window", getattr(model.config, "sliding_window", None)) or 0
        found.append(Attends(angles, window if window < context else 0, attention.scaling))
    return found


def _check_layers(ours: list[Attends], theirs: list[Attends]) -> None:
    import torch

    for layer, (here, there) in enumerate(zip(ours, theirs, strict=True)):
        if here.window != there.window:
            what = f"sees {here.window} tokens here (0: all), {there.window} there"
        elif not isclose(here.scale, there.scale, rel_tol=1e-5):
            what = f"multiplies scores by {here.scale:.6g} here, {there.scale:.6g} there"
        elif len(here.angles) != len(there.angles) or not torch.allclose(here.angles, there.angles, rtol=1e-5, atol=0):
            what = "turns the pairs of its heads by other angles"
        else:
            continue
        raise UserError(
            f"its layer {layer} attends otherwise than in transformers (it {what}): hasten does not compute this "
            f"checkpoint; {WITHOUT}"
        )


def _theirs(source: Path, ids: Tensor, tokens: int, context: int) -> tuple[Tensor, list[Attends]]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=torch.float32,
            attn_implementation="sdpa",  # a config.json may ask for another, even one to download and run
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
        with torch.inference_mode():
            logits: Tensor = model.eval()(ids, logits_to_keep=tokens).logits.float()
            layers = _their_layers(model, context)
    except Exception as error:  # it raises errors of every kind
        raise UserError(f"transformers cannot open it, so nothing can be compared ({WITHOUT}): {error}") from None
    return logits, layers
