"""Settings all tests share."""

import os

from hypothesis import settings

from hasten.config import QUIET

os.environ.update(QUIET)
settings.register_profile("shared", deadline=None)  # on a machine that others use too, a slow example is no bug
settings.load_profile("shared")
