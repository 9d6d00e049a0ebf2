"""Measure a variant on an engine: measurements/<name>.json, predictions/<name>.parquet, continuations/<name>.parquet.

    python pipelines/evaluate.py plan=default name=int8-llamacpp variant=int8 engine=llamacpp 'scenario=[qa]'

A trial that crashes, hangs or is refused by its engine is an outcome like any other: this exits 0 and the rest goes
on; `dvc repro -f -s evaluate@NAME` tries it again.
"""

from hasten.config import stage
from hasten.stages import Evaluate


@stage(Evaluate)
def main(config: Evaluate) -> None:
    from hasten.artifacts import digest, load_checkpoint, write_json
    from hasten.evaluation import continuation, quality, trial
    from hasten.evaluation.bits_per_byte import recorded_bits_per_byte
    from hasten.evaluation.measurement import measurement
    from hasten.evaluation.summary import build_cost, ceilings_of, figures, machine_of, tell
    from hasten.tracking import track

    folder, machine = config.folder, machine_of(config.engine)
    variant = load_checkpoint(folder / "variants" / config.variant)
    inputs = {"variant": variant.hash, "machine": machine["id"]}
    inputs |= {name: digest(folder / name) for name in ("tasks", "checkpoints/tuned")}
    job = config.job("validation")
    inputs |= {"draft": job.draft.hash} if job.draft else {}
    tags = {"variant": config.variant, "engine": config.engine.name, "lineage": variant.manifest["lineage"]}
    record = config.record("evaluate", config.name)
    with track("evaluate", config, item=config.name, inputs=inputs, tags=tags, record=record) as run:
        ceilings = ceilings_of(config.engine)
        outcome = trial.judged(job, trial.run(job, config.limits), config.limits)
        built = build_cost(config.record("compress", config.variant))
        predicted = recorded_bits_per_byte(folder / "bits_per_byte" / f"{config.variant}.json")
        result = measurement(job, outcome, machine=machine, build=built, predicted=predicted, ceilings=ceilings)
        files = [folder / kind / f"{config.name}.parquet" for kind in ("predictions", "continuations")]
        quality.save_predictions(outcome.predictions, files[0])
        continuation.save(outcome.continuations, files[1])
        write_json(path := folder / "measurements" / f"{config.name}.json", result)
        run.metrics(figures(result))
        run.tags({name: result[name] for name in ("status", "kernel", "native", "bound")})
        for file in (path, *files):
            run.artifact(file)
    tell(result)


if __name__ == "__main__":
    main()
