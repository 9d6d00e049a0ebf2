from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.importing.fit import expected_shapes
from hasten.model.decoder import Decoder
from tests.importing.arrivals import SHAPES
from tests.tiny import shape


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {"kv_heads": 1}, {"feed_forward_size": 24}])
def test_what_is_expected_is_what_the_network_holds(name: str, changes: dict[str, Any]) -> None:
    config = shape(**{**SHAPES[name], **changes})
    with torch.device("meta"):
        held = {key: tuple(value.shape) for key, value in Decoder(config).state_dict().items()}
    if config.tied_head:
        del held["lm_head.weight"]
    assert expected_shapes(config) == held
