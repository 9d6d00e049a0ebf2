"""A base model, trained from scratch or imported: artifacts/<plan>/checkpoints/base.

python pipelines/pretrain.py plan=default model=tiny training.steps=200
python pipelines/pretrain.py plan=mine model=huggingface model.path=path/to/checkpoint
"""

from hasten.config import stage
from hasten.stages import Pretrain


@stage(Pretrain)
def main(config: Pretrain) -> None:
    from hasten.artifacts import Tokens, digest
    from hasten.model.imported import Huggingface
    from hasten.tracking import track

    model, tokenizer, target = config.model, config.folder / "tokenizer", config.folder / "checkpoints/base"
    if isinstance(model, Huggingface):
        from hasten.importing.checkpoint import fetch, import_checkpoint, source_digest

        source = fetch(model)
        inputs = {"source": source_digest(source), "tokenizer": digest(tokenizer)}
        with track("pretrain", config, inputs=inputs, record=config.record("pretrain")) as run:
            run.metrics(import_checkpoint(source, tokenizer, model, target))
        return

    from hasten.training.placement import roofs
    from hasten.training.pretraining import pretrain, refuse_unfit

    tokens = Tokens(config.folder / "tokens")
    refuse_unfit(model, tokens, config.training)
    inputs = {"tokens": tokens.hash, "tokenizer": digest(tokenizer)}
    scratch, record = config.scratch("pretrain", inputs), config.record("pretrain")
    with track("pretrain", config, inputs=inputs, record=record, begun=scratch) as run:
        fitted = pretrain(
            tokens,
            tokenizer,
            model,
            config.training,
            seed=config.seed,
            scratch=scratch,
            target=target,
            metrics=run,
            ceilings=roofs(config.training),
        )
        run.metrics(fitted.figures())


if __name__ == "__main__":
    main()
