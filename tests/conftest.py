"""Settings all tests share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from hasten.config import QUIET

os.environ.update(QUIET)
settings.register_profile("shared", deadline=None)  # on a machine that others use too, a slow example is no bug
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A whole pipeline may take longer than `timeout` says."""
    for item in items:
        if "smoke" in item.path.parts or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines build what they need: once, also for tests that run in several processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engines"
