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
        # Plans that were run here; a report that came with the repository is somebody else's run.
        plans = sorted(path.parent.name for path in Path("artifacts").glob("*/runs"))
        records = [record for plan in plans for record in sorted(Path("artifacts", plan, "runs").glob("*.json"))]
        records += [record for plan in plans if (record := Path("reports", plan, "run.json")).is_file()]
        for record in records:
            replay(record)
        for verdict in [found for plan in plans if (found := Path("reports", plan, "verdict.json")).is_file()]:
            register_champions(verdict)
            share_view(verdict)
    except UserError as error:
        fail("publish", str(error))
    console.print(f"{len(records)} runs are in {uri()}")


if __name__ == "__main__":
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    main()
