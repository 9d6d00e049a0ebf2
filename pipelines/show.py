"""Print the verdict of the plan in force, and where the report and the MLflow UI are.

python pipelines/show.py
"""

from pathlib import Path

from hasten.config import fail
from hasten.stages import load_measurements, load_plan


def main() -> None:
    from rich.console import Console

    from hasten.artifacts import read_json
    from hasten.errors import UserError
    from hasten.reporting.study import scenario_titles
    from hasten.reporting.table import summary
    from hasten.tracking.store import connect
    from hasten.tracking.view import view_link

    console = Console(highlight=False)
    try:
        plan = load_plan()
        folder = Path("reports", plan["plan"])
        console.print(summary(load_measurements(plan), read_json(folder / "verdict.json"), titles=scenario_titles()))
        link = view_link(connect()[1], plan["plan"])
    except UserError as error:
        fail("show", str(error))
    console.print(f"report:  {folder}/report.html\nMLflow:  make ui, then http://127.0.0.1:5000{link}", soft_wrap=True)


if __name__ == "__main__":
    main()
