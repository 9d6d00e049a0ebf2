"""Teach a base model its tasks: artifacts/<plan>/checkpoints/tuned.

python pipelines/finetune.py plan=default tuning=full training.epochs=2
"""

from hasten.config import stage
from hasten.stages import Finetune


@stage(Finetune)
def main(config: Finetune) -> None:
    from hasten.artifacts import digest, load_checkpoint
    from hasten.task.data import load_tasks
    from hasten.tokenizer.base import load_tokenizer
    from hasten.tracking import track
    from hasten.training.finetuning import finetune

    base, tasks = load_checkpoint(config.folder / "checkpoints/base"), load_tasks(config.folder / "tasks")
    inputs = {"base": base.hash, "tasks": digest(config.folder / "tasks")}
    with track("finetune", config, inputs=inputs, record=config.record("finetune")) as run:
        fitted = finetune(
            base,
            tasks,
            load_tokenizer(base.path),
            config.tuning,
            config.training,
            prompt_loss_weight=config.prompt_loss_weight,
            max_tokens=config.max_tokens,
            seed=config.seed,
            scratch=config.scratch("finetune", run.key),
            target=config.folder / "checkpoints/tuned",
            metrics=run,
        )
        run.metrics(fitted.figures())


if __name__ == "__main__":
    main()
