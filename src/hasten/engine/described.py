"""An engine from what a record says of it: `Engine.describe` the other way round."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

from hasten.artifacts import Json
from hasten.config import discover
from hasten.engine.base import Engine


def engine_of(options: Json) -> Engine:
    """The engine with the options that it was measured with, but for its threads: those are this machine's."""
    kind: type[Engine] = discover("engine")[options["engine"]]
    given: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "threads" or field.name not in options:
            continue
        value = options[field.name]
        if isinstance(field.default, Enum):
            if value == "fp8":  # what vLLM's own option says, which is among the others
                continue
            value = type(field.default)(value)
        given[field.name] = value
    return kind(**given)
