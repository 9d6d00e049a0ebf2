"""Measure a variant on an engine: artifacts/<plan>/measurements/<name>.json and predictions/<name>.parquet.

    python pipelines/evaluate.py plan=default name=int8-llamacpp variant=int8 engine=llamacpp 'scenario=[qa]'

A trial that crashes, hangs or is refused by its engine is an outcome like any other: this exits 0 and the rest goes
on; `dvc repro -f -s evaluate@NAME` tries it again.
"""

from hasten.config import stage
from hasten.stages import Evaluate


@stage(Evaluate)
def main(config: Evaluate) -> None:
    from hasten.artifacts import digest, load_checkpoint, write_json
    from hasten.evaluation.measurement import measurement
    from hasten.evaluation.quality import save_predictions
    from hasten.evaluation.summary import build_cost, figures, machine_of, tell
    from hasten.evaluation.trial import run as run_trial
    from hasten.tracking import track

    variant, machine = load_checkpoint(config.folder / "variants" / config.variant), machine_of(config.engine)
    inputs = {"variant": variant.hash, "tasks": digest(config.folder / "tasks"), "machine": machine["id"]}
    tags = {"variant": config.variant, "engine": config.engine.name, "lineage": variant.manifest["lineage"]}
    record = config.record("evaluate", config.name)
    with track("evaluate", config, item=config.name, inputs=inputs, tags=tags, record=record) as run:
        job = config.job("validation")
        outcome = run_trial(job, config.timeout_seconds)
        built = build_cost(config.record("compress", config.variant))
        result = measurement(job, outcome, machine=machine, build=built)
        predictions = config.folder / "predictions" / f"{config.name}.parquet"
        save_predictions(outcome.predictions, predictions)
        path = config.folder / "measurements" / f"{config.name}.json"
        write_json(path, result)
        run.metrics(figures(result))
        run.tags({"status": result["status"], "kernel": result["kernel"], "native": result["native"]})
        run.artifact(path)
        run.artifact(predictions)
    tell(result)


if __name__ == "__main__":
    main()
