"""Choose the reference and the finalists on the validation split: artifacts/<plan>/finalists.json.

python pipelines/select_finalists.py plan=default
"""

from collections.abc import Sequence

from hasten.config import stage
from hasten.stages import Select, check_drafts, load_all_predictions, load_measurements, load_plan, trial_config


@stage(Select)
def main(config: Select) -> None:
    from hasten.artifacts import digest, write_json
    from hasten.evaluation.qualifying import Qualified, qualify
    from hasten.evaluation.selection import select
    from hasten.tracking import track

    plan = load_plan()
    measurements = load_measurements(plan)
    check_drafts(plan, measurements)
    peaks = {measurement["trial"]: measurement["peak_memory_bytes"] for measurement in measurements}

    def play(scenario: str, trials: Sequence[str]) -> Qualified:
        jobs = {trial: trial_config(plan, trial).job("validation") for trial in trials}
        budget = config.time_budget_seconds
        return qualify(jobs, scenario, passes=config.passes, budget_seconds=budget, limits=config.limits, peaks=peaks)

    inputs = {name: digest(config.folder / name) for name in ("measurements", "predictions")}
    with track("select", config, inputs=inputs, record=config.record("select")) as run:
        chosen = select(
            measurements,
            load_all_predictions(plan),
            plan=config.plan,
            scenarios=plan["scenario"].split(","),
            margin_points=config.margin_points,
            language_margin_points=config.language_margin_points,
            finalists=config.finalists,
            qualifiers=config.qualifiers,
            qualify=play if config.passes else None,
            seed=config.seed,
        )
        write_json(path := config.folder / "finalists.json", chosen)
        run.artifact(path)
        for name, entry in chosen["scenarios"].items():
            run.tags({f"{name}.reference": entry["reference"], f"{name}.finalists": ", ".join(entry["finalists"])})


if __name__ == "__main__":
    main()
