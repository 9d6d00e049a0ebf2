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
    from hasten.compression.make import calibrated, make_variant
    from hasten.evaluation.measurement import measurement
    from hasten.evaluation.quality import save_predictions
    from hasten.evaluation.summary import figures, machine_of, tell
    from hasten.evaluation.trial import run as run_trial
    from hasten.tracking import track

    folder, parent = Path(HydraConfig.get().runtime.output_dir), load_checkpoint(config.folder / config.parent)
    name = config.variant_name(HydraConfig.get().overrides.task)
    machine, trial = machine_of(config.engine), f"{name}-{config.engine.name}"
    tags = {"variant": name, "engine": config.engine.name, "method": config.compression.name}
    tags["sweep"] = folder.parent.name if HydraConfig.get().job.get("num") is not None else folder.name
    inputs = {"parent": parent.hash, "machine": machine["id"]}
    with track("sweep", config, item=trial, inputs=inputs, tags=tags, record=folder / "run.json") as run:
        calibration = calibrated(config.compression, config.folder / "tokens", config.calibration, config.seed)
        target = folder / "variants" / name
        variant, cost = make_variant(
            config.compression, parent, calibration, name=name, target=target, seed=config.seed
        )
        evaluation = Evaluate(config.plan, config.seed, trial, name, config.engine, config.scenario)
        job = replace(evaluation.job("validation"), variant=target)
        outcome = run_trial(job, config.timeout_seconds)
        result = measurement(job, outcome, machine=machine, build=cost)
        save_predictions(outcome.predictions, folder / "predictions.parquet")
        write_json(folder / "measurement.json", result)
        run.metrics(figures(result) | cost)
        run.tags({"lineage": variant.lineage, "status": result["status"], "kernel": result["kernel"]})
        run.artifact(folder / "measurement.json")
    tell(result)


if __name__ == "__main__":
    main()
