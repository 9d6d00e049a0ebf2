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

    from hasten.training.pretraining import pretrain

    tokens = Tokens(config.folder / "tokens")
    inputs = {"tokens": tokens.hash, "tokenizer": digest(tokenizer)}
    with track("pretrain", config, inputs=inputs, record=config.record("pretrain")) as run:
        fitted = pretrain(
            tokens,
            tokenizer,
            model,
            config.training,
            seed=config.seed,
            scratch=config.scratch("pretrain", run.key),
            target=target,
            metrics=run,
        )
        run.metrics(fitted.figures())


if __name__ == "__main__":
    main()
