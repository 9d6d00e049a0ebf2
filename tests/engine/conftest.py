"""Shared by tests of several engines."""

from __future__ import annotations

import pytest

from tests.engine import llama
from tests.engine.shelf import Shelf


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """With a draft beside all others, for those that want one."""
    folder = tmp_path_factory.mktemp("shelf")
    one = llama.shape(layers=1)
    llama.variant(folder / "draft", one, llama.random_tensors(one, seed=1))
    return Shelf(folder)
