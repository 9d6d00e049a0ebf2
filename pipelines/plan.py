"""Put a plan in force: conf/plans/<name>.yaml becomes params.yaml. Without a name, the one in force stays.

python pipelines/plan.py name=miniature
"""

from pathlib import Path

from hasten.config import fail
from hasten.stages import load_plan


def main(arguments: list[str]) -> None:
    from hasten.artifacts import replacing
    from hasten.errors import UserError

    plans = sorted(path.stem for path in Path("conf/plans").glob("*.yaml"))
    try:
        for argument in arguments:
            key, _, name = argument.partition("=")
            if key != "name" or name not in plans:
                raise UserError(f"name must be one of {plans}, got {argument!r}")
            with replacing(Path("params.yaml")) as target:
                target.write_bytes(Path("conf/plans", f"{name}.yaml").read_bytes())
        load_plan()
    except UserError as error:
        fail("plan", str(error))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
