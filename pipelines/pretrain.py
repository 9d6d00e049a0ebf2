"""Train a base model from scratch: artifacts/<plan>/checkpoints/base.

python pipelines/pretrain.py plan=default model=tiny training.steps=200
"""

from hasten.config import stage
from hasten.stages import Pretrain


@stage(Pretrain)
def main(config: Pretrain) -> None:
    from hasten.artifacts import Tokens, digest
    from hasten.tracking import track
    from hasten.training.pretraining import pretrain

    tokens, tokenizer = Tokens(config.folder / "tokens"), config.folder / "tokenizer"
    inputs = {"tokens": tokens.hash, "tokenizer": digest(tokenizer)}
    with track("pretrain", config, inputs=inputs, record=config.record("pretrain")) as run:
        fitted = pretrain(
            tokens,
            tokenizer,
            config.model,
            config.training,
            seed=config.seed,
            scratch=config.scratch("pretrain", run.key),
            target=config.folder / "checkpoints/base",
            metrics=run,
        )
        run.metrics(fitted.figures())


if __name__ == "__main__":
    main()
