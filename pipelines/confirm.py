"""Measure the finalists against the reference, in turns, and on the test split: artifacts/<plan>/confirmation.json.

python pipelines/confirm.py plan=default
"""

from hasten.config import stage
from hasten.stages import Confirm, load_plan, trial_config


@stage(Confirm)
def main(config: Confirm) -> None:
    from hasten.artifacts import digest, read_json, write_json
    from hasten.evaluation.confirmation import confirm, trials_of
    from hasten.evaluation.quality import save_predictions
    from hasten.tracking import track

    plan, finalists = load_plan(), read_json(config.folder / "finalists.json")
    jobs = {trial: trial_config(plan, trial).job("test") for trial in trials_of(finalists)}
    inputs = {trial: digest(job.variant) for trial, job in jobs.items()}
    inputs |= {f"{trial}.draft": job.draft.hash for trial, job in jobs.items() if job.draft}
    with track("confirm", config, inputs=inputs, record=config.record("confirm")) as run:
        confirmation, rows = confirm(
            finalists,
            jobs,
            rounds=config.rounds,
            passes=config.passes,
            precision=config.precision_percent / 100,
            budget_seconds=config.time_budget_seconds,
            limits=config.limits,
            together=config.together,
        )
        path, predictions = config.folder / "confirmation.json", config.folder / "confirmation.parquet"
        save_predictions(rows, predictions)
        write_json(path, confirmation)
        run.artifact(path)
        run.artifact(predictions)


if __name__ == "__main__":
    main()
