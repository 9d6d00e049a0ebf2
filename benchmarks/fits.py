"""Why the default fits are done as they are: optimisers and losses side by side, on the default plan's tokens.

    python benchmarks/fits.py          # after `make repro`; about five minutes on two cores

Prints the validation loss after 50 steps with AdamW and with Muon, each from the start in which every block is the
identity and from 0.02 everywhere, and the time of a step with the textbook loss and with the chunked one (medians, and
the ratio with the spread over rounds).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.artifacts import Tokens
from hasten.model.config import ModelConfig
from hasten.model.decoder import Decoder
from hasten.training.data import Batch, PackedTokens
from hasten.training.loss import weighted_loss
from hasten.training.optimiser import build_optimiser, learning_rate_factor
from hasten.training.options import Optimiser, Training
from hasten.training.pretraining import held_out

STEPS, BATCH, LENGTH, ROUNDS = 50, 8, 256, 9
SHAPE = {"layers": 6, "hidden_size": 192, "heads": 3, "kv_heads": 1, "feed_forward_size": 512}
Loss = Callable[[Decoder, Batch], Tensor]


def fresh(tokens: Tokens, *, identity: bool = True) -> Decoder:
    model = Decoder(ModelConfig(**SHAPE, vocab_size=tokens.manifest["vocab_size"]))
    model.initialise(0)
    if not identity:
        generator = torch.Generator().manual_seed(0)
        for weight in (p for p in model.parameters() if p.dim() >= 2):
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def textbook_loss(model: Decoder, batch: Batch) -> Tensor:
    losses = F.cross_entropy(model(batch["ids"])[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
    weights = batch["weights"][:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(model: Decoder, batches: PackedTokens, options: Training, loss: Loss, steps: int) -> list[float]:
    """Seconds of each step."""
    optimiser = build_optimiser(model, options)
    base = [group["lr"] for group in optimiser.param_groups]
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        for group, rate in zip(optimiser.param_groups, base, strict=True):
            group["lr"] = rate * learning_rate_factor(step, steps, options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(model, batches[step])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    tokens = Tokens(Path("artifacts/default/tokens"))
    batches = PackedTokens(tokens, "train", steps=STEPS, batch_size=BATCH, length=LENGTH, seed=0, apart=False)
    print(f"validation loss after {STEPS} steps of {BATCH} x {LENGTH} tokens, learning rate 3e-3")
    for optimiser in Optimiser:
        for identity in (False, True):
            options = Training(learning_rate=3e-3, optimiser=optimiser, weight_decay=0.01)
            model = fresh(tokens, identity=identity)
            seconds = train(model, batches, options, weighted_loss, STEPS)
            with torch.no_grad():
                figures = held_out(model, tokens, options)
            start = "identity" if identity else "0.02"
            step = statistics.median(seconds)
            print(
                f"  {optimiser.name:6} start {start:8} loss {figures['validation_loss']:.3f}  {1000 * step:.0f} ms/step"
            )
    print("milliseconds per step, textbook loss against chunked loss, in turns")
    options = Training(optimiser=Optimiser.adamw)
    models = {loss: fresh(tokens) for loss in (textbook_loss, weighted_loss)}
    pairs = [
        [statistics.median(train(model, batches, options, loss, 3)) for loss, model in models.items()]
        for _ in range(ROUNDS)
    ]
    ratios = sorted(slow / fast for slow, fast in pairs)
    medians = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
    print(f"  textbook {medians[0]:.0f}  chunked {medians[1]:.0f}  ratio {statistics.median(ratios):.2f} "
          f"[{ratios[0]:.2f}, {ratios[-1]:.2f}] over {ROUNDS} rounds")  # fmt: skip


if __name__ == "__main__":
    main()
