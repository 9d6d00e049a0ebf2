"""Make a variant from a parent, artifacts/<plan>/variants/<name>; how well it predicts: bits_per_byte/<name>.json.

python pipelines/compress.py plan=default name=int4 parent=variants/baseline compression=rtn compression.bits=4
"""

from hasten.config import stage
from hasten.stages import Compress


@stage(Compress)
def main(config: Compress) -> None:
    from hasten.artifacts import digest, load_checkpoint, write_json
    from hasten.compression.make import make_variant
    from hasten.evaluation import bits_per_byte
    from hasten.tracking import track

    parent, method, tokens = (
        load_checkpoint(config.folder / config.parent),
        config.compression,
        config.folder / "tokens",
    )
    inputs = {"parent": parent.hash, "tokens": digest(tokens), "tasks": digest(config.folder / "tasks")}
    tags = {"variant": config.name, "method": method.name, "parent": config.parent}
    record = config.record("compress", config.name)
    with track("compress", config, item=config.name, inputs=inputs, tags=tags, record=record) as run:
        calibration = config.calibration.rows_for(method, config.folder, parent, config.seed)
        target = config.folder / "variants" / config.name
        variant, cost = make_variant(method, parent, calibration, name=config.name, target=target, seed=config.seed)
        run.tags({"lineage": variant.lineage})
        run.metrics({"artifact_bytes": variant.weight_bytes, **cost})
        for curve, points in variant.manifest["curves"].items():
            for step, value in points:
                run.metrics({curve: value}, step)
        predicted = bits_per_byte.attempt(variant, tokens, config.folder / "tokenizer", config.bits_per_byte)
        write_json(config.folder / "bits_per_byte" / f"{config.name}.json", predicted)
        run.metrics(bits_per_byte.metrics(predicted))
        run.tags(predicted["why"])


if __name__ == "__main__":
    main()
