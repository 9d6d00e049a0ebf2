"""Tiny fits for tests, alone or as one of several processes: `torchrun ... tests/training/fits.py JSON FOLDER`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hasten.artifacts import Tokens, write_json
from hasten.model.network import Network
from hasten.ranks import rank, world_size
from hasten.training import placement
from hasten.training.data import PackedTokens, Share
from hasten.training.loop import Fitted, fit
from hasten.training.options import Optimiser, Strategy, Training
from hasten.training.pretraining import sequences
from hasten.tuning.lora import Lora
from tests.tiny import Curves, decoder, lstm, shape, training, write_tokens


class StoppedError(Exception):
    """A fit that a test ends, in all processes at the same step."""


def fitted(
    folder: Path,
    scratch: Path,
    *,
    seed: int = 0,
    metrics: Curves | None = None,
    stop_at: int = 0,
    scores: Sequence[float] = (),
    terminate_at: int = 0,
    lora: bool = False,
    model: Network | None = None,
    **changes: Any,
) -> tuple[Network, Fitted]:
    """A dozen steps of a tiny decoder on the tokens in `folder`; the network and what the fit says of itself.

    stop_at: a validation's step at which it ends with `StoppedError`. scores: what validations find in turn.
    terminate_at: such a step at which the last process gets SIGTERM. lora: train adapters, and merge them.
    """
    options, model = training(**changes), model or decoder(spread=0.02)
    validations = itertools.count()

    def validate(network: Network) -> dict[str, float]:
        number = next(validations)
        if stop_at and (number + 1) * options.validate_every_steps >= stop_at:
            raise StoppedError
        if terminate_at == (number + 1) * options.validate_every_steps and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        network(torch.arange(10).view(2, 5))
        return {"accuracy_probe": scores[number]} if scores else {"probe": 1.0}

    tuning = Lora(rank=4)
    if lora:
        tuning.attach(model, seed=0, low_precision=False)
    result = fit(
        model,
        lambda share: passes(folder, options, seed, share, encodes_prompt=not model.predicts_prompt),
        options,
        steps=options.steps,
        scratch=scratch,
        seed=seed,
        validate=validate,
        metrics=metrics or Curves(),
        title="test",
    )
    if lora and result.exports:
        tuning.merge(model)
    return model, result


def passes(folder: Path, options: Training, seed: int, share: Share, *, encodes_prompt: bool = False) -> PackedTokens:
    return sequences(
        Tokens(folder), options, steps=options.steps, seed=seed, encodes_prompt=encodes_prompt, share=share
    )


def main(cases: dict[str, dict[str, Any]], folder: Path) -> None:
    """Run the cases one after the other; the first process writes `<case>.safetensors` and `<case>.json`."""
    placement.cpu_count = lambda: 4  # more than the machine may have: these fits are tiny
    for name, case in cases.items():
        changes = dict(case)
        changes["strategy"] = Strategy[changes["strategy"]]
        changes["optimiser"] = Optimiser[changes.get("optimiser", "adamw")]
        changed = changes.pop("shape", {})
        model = lstm(spread=0.3) if changes.pop("recurrent", False) else decoder(shape(**changed), spread=0.02)
        curves = Curves()
        scratch = folder / changes.pop("scratch", f"{name}-scratch")
        try:
            network, result = fitted(folder / "tokens", scratch, metrics=curves, model=model, **changes)
        except StoppedError:
            continue
        except SystemExit as ended:
            write_json(folder / f"{name}-{rank()}.json", {"code": ended.code})
            continue
        if result.exports:
            state = {key: value.detach().clone() for key, value in network.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")
            loss = {str(step): value for step, value in curves.curve("train_loss").items()}
            facts = {
                "loss": loss,
                "resumed_at_step": result.resumed_at_step,
                "tokens": result.tokens,
                "steps": result.steps,
            }
            facts["validation"] = result.validation
            write_json(folder / f"{name}.json", facts)


if __name__ == "__main__":
    where = Path(sys.argv[2])
    if not (where / "tokens").exists():
        write_tokens(where / "tokens")
    main(json.loads(Path(sys.argv[1]).read_text()), where)
