"""Compress and evaluate, job by job, into one folder and one sweep in MLflow.

python pipelines/sweep.py -m compression=rtn compression.bits=4,8 engine=eager,llamacpp
"""

from dataclasses import replace
from pathlib import Path

from hasten.config import stage
from hasten.stages import Evaluate, Sweep


@stage(Sweep)
def main(config: Sweep) -> None:
    from hydra.core.hydra_config import HydraConfig

    from hasten.artifacts import load_checkpoint, write_json
    from hasten.compression.make import make_variant
    from hasten.evaluation import bits_per_byte, continuation, quality, trial
    from hasten.evaluation.measurement import measurement
    from hasten.evaluation.summary import ceilings_of, figures, machine_of, tell
    from hasten.tracking import track

    folder, parent = Path(HydraConfig.get().runtime.output_dir), load_checkpoint(config.folder / config.parent)
    name = config.variant_name(HydraConfig.get().overrides.task)
    machine, label = machine_of(config.engine), f"{name}-{config.engine.name}"
    tags = {"variant": name, "engine": config.engine.name, "method": config.compression.name}
    tags["sweep"] = folder.parent.name if HydraConfig.get().job.get("num") is not None else folder.name
    inputs, method = {"parent": parent.hash, "machine": machine["id"]}, config.compression
    target, tokens = folder / "variants" / name, config.folder / "tokens"
    with track("sweep", config, item=label, inputs=inputs, tags=tags, record=folder / "run.json") as run:
        text = config.calibration.rows_for(method, config.folder, parent, config.seed)
        variant, cost = make_variant(method, parent, text, name=name, target=target, seed=config.seed)
        predicted = bits_per_byte.attempt(variant, tokens, config.folder / "tokenizer", config.bits_per_byte)
        whole = Evaluate(config.plan, config.seed, label, name, config.engine, config.scenario)
        job, ceilings = replace(whole.job("validation"), variant=target), ceilings_of(config.engine)
        outcome = trial.judged(job, trial.run(job, config.limits), config.limits)
        build = {key.removeprefix("build_"): value for key, value in cost.items()}
        result = measurement(job, outcome, machine=machine, build=build, predicted=predicted, ceilings=ceilings)
        quality.save_predictions(outcome.predictions, folder / "predictions.parquet")
        continuation.save(outcome.continuations, folder / "continuations.parquet")
        write_json(folder / "measurement.json", result)
        run.metrics(figures(result) | cost | bits_per_byte.metrics(predicted))
        run.tags({"lineage": variant.lineage, "status": result["status"], "kernel": result["kernel"]})
        run.artifact(folder / "measurement.json")
    tell(result)


if __name__ == "__main__":
    main()
