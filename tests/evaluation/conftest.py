from __future__ import annotations

import pytest

from hasten.artifacts import Variant
from hasten.tokenizer.base import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(variant: Variant) -> Tokenizer:
    """That of the module's own `variant`."""
    return load_tokenizer(variant.path)
