"""Random calibration rows for the vocabulary of `tests.tiny`."""

from __future__ import annotations

import torch

from hasten.compression.base import Calibration
from tests.tiny import VOCABULARY


def text(
    rows: int = 12,
    length: int = 16,
    *,
    documents: int = 1,
    padding: int = 0,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> Calibration:
    """documents: of equal length in each row. padding: tokens at the end of every second row."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    of = (torch.arange(length) * documents // length).int().repeat(rows, 1)
    weights = torch.ones(rows, length)
    weights[:, 1:][of[:, 1:] != of[:, :-1]] = 0
    weights[:, 0] = 0
    if padding:
        of[::2, -padding:], weights[::2, -padding:], ids[::2, -padding:] = -1, 0, 0
    return Calibration(ids, of, weights, f"{rows} x {length} random tokens")
