"""Everything to a verdict, in reports/<plan>: verdict.json, metrics.json, frontier.png, report.html.

python pipelines/report.py plan=default
"""

from hasten.config import stage
from hasten.stages import Report, load_all_predictions, load_measurements, load_plan


@stage(Report)
def main(config: Report) -> None:
    from hasten.artifacts import digest
    from hasten.reporting.study import write_reports
    from hasten.tracking import track
    from hasten.tracking.registry import register_champions
    from hasten.tracking.run import annotate
    from hasten.tracking.view import share_view

    plan = load_plan()
    names = ("finalists.json", "confirmation.json", "confirmation.parquet", "measurements")
    inputs = {name: digest(config.folder / name) for name in names}
    with track("report", config, inputs=inputs, record=config.reports / "run.json") as run:
        verdict, files, facts = write_reports(
            config.folder, config.reports, load_measurements(plan), load_all_predictions(plan), plan, config.seed
        )
        for path in files:
            run.artifact(path)
        run.tags({f"{name}.verdict": entry["sentence"] for name, entry in verdict["scenarios"].items()})
        for trial, (tags, figures) in facts.items():
            annotate(config.record("evaluate", trial), tags, figures)
        register_champions(config.reports / "verdict.json")
        share_view(config.reports / "verdict.json")


if __name__ == "__main__":
    main()
