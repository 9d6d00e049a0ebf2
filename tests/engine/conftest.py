"""Shared by tests of several engines."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled once for all tests."""
    return tmp_path_factory.mktemp("cache")
