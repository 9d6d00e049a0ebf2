"""An engine from what a record says of it: `Engine.describe` the other way round."""

from __future__ import annotations

from dataclasses import MISSING, fields
from enum import Enum
from importlib import import_module
from typing import Any

from hasten.artifacts import Json
from hasten.config import camel_case
from hasten.engine.base import Engine


def engine_of(options: Json) -> Engine:
    """The engine with the options that it was measured with, but for its threads: those are this machine's."""
    name = options["engine"]
    kind: type[Engine] = getattr(import_module(f"hasten.engine.{name}"), camel_case(name))
    given: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == "threads" or field.name not in options:
            continue
        value = options[field.name]
        if field.default is not MISSING and isinstance(field.default, Enum):
            known = {member.value: member for member in type(field.default)}
            if value not in known:
                continue  # another option's doing, such as vLLM's fp8
            value = known[value]
        given[field.name] = value
    return kind(**given)
