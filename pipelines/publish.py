"""Send every record on disk to the MLflow store again: rebuilds an empty one, repeats nothing in a full one.

python pipelines/publish.py
"""

import os
from pathlib import Path

from hasten.config import QUIET, fail


def main() -> None:
    from rich.console import Console

    from hasten.errors import UserError
    from hasten.tracking.registry import register_champions
    from hasten.tracking.run import replay
    from hasten.tracking.store import uri
    from hasten.tracking.view import share_view

    console = Console()
    try:
        records = sorted(Path("artifacts").glob("*/runs/*.json")) + sorted(Path("reports").glob("*/run.json"))
        for record in records:
            replay(record)
        for verdict in sorted(Path("reports").glob("*/verdict.json")):
            register_champions(verdict)
            share_view(verdict)
    except UserError as error:
        fail("publish", str(error))
    console.print(f"{len(records)} runs are in {uri()}")


if __name__ == "__main__":
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    main()
