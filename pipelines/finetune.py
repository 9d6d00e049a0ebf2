"""Teach a base model its tasks: artifacts/<plan>/checkpoints/tuned.

python pipelines/finetune.py plan=default tuning=full training.epochs=2
"""

from hasten.config import stage
from hasten.stages import Finetune


@stage(Finetune)
def main(config: Finetune) -> None:
    from hasten.artifacts import Tokens, digest, load_checkpoint
    from hasten.model.shape import read_shape
    from hasten.task.data import load_tasks
    from hasten.tokenizer.base import load_tokenizer
    from hasten.tracking import track
    from hasten.training.finetuning import finetune, refuse_unfit
    from hasten.training.placement import roofs

    base, tasks = load_checkpoint(config.folder / "checkpoints/base"), load_tasks(config.folder / "tasks")
    tokens = Tokens(config.folder / "tokens")
    refuse_unfit(read_shape(base.config), config.tuning, config.training)
    inputs = {"base": base.hash, "tasks": digest(config.folder / "tasks"), "tokens": tokens.hash}
    scratch, record = config.scratch("finetune", inputs), config.record("finetune")
    with track("finetune", config, inputs=inputs, record=record, begun=scratch) as run:
        fitted = finetune(
            base,
            tasks,
            tokens,
            load_tokenizer(base.path),
            config.tuning,
            config.training,
            prompt_loss_weight=config.prompt_loss_weight,
            rehearsal=config.rehearsal,
            max_tokens=config.max_tokens,
            seed=config.seed,
            scratch=scratch,
            target=config.folder / "checkpoints/tuned",
            metrics=run,
            ceilings=roofs(config.training),
        )
        run.metrics(fitted.figures())


if __name__ == "__main__":
    main()
