"""Describe this machine and every engine's libraries: artifacts/machine/<engine>.json.

    python pipelines/probe.py

Always run by DVC, and cheap: an engine's file changes only when the machine or a library that decides its speed does.
"""

from pathlib import Path

from hasten.artifacts import SCHEMA, replacing, write_json
from hasten.config import discover, stage
from hasten.engine.base import Engine
from hasten.hardware import machine
from hasten.stages import Probe


@stage(Probe)
def main(config: Probe) -> None:
    with replacing(Path("artifacts/machine")) as folder:
        for name, engine in discover("engine").items():
            assert issubclass(engine, Engine)
            write_json(folder / f"{name}.json", {"schema": SCHEMA, **machine(), "libraries": engine.versions()})


if __name__ == "__main__":
    main()
