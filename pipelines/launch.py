"""Print how to start a fit on many processes: a torchrun command line, or a batch file for Slurm. Nothing is started.

python pipelines/launch.py kind=torchrun stage=pretrain processes=8 training.strategy=ddp
python pipelines/launch.py kind=slurm stage=pretrain nodes=2 processes=8 training.strategy=fsdp > fit.sbatch

What the plan in force chooses for the stage comes first; overrides given here take its place.
"""

import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hasten.config import compose, fail, user_sentence
from hasten.stages import Finetune, Pretrain, load_plan

ROOTS: dict[str, Any] = {"pretrain": Pretrain, "finetune": Finetune}


def main(arguments: list[str]) -> None:
    import hydra

    from hasten.training.launch import check, merged, read, text

    try:
        launch, plan = read(arguments), load_plan()
        root = ROOTS[launch.stage]
        axes = [one.name for one in fields(root) if one.name in ("model", "tuning")]
        chosen = [f"{name}={plan[name]}" for name in ("plan", *axes)]
        launch = replace(launch, overrides=merged([*chosen, *shlex.split(plan["set"][launch.stage])], launch.overrides))
        with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
            config = compose(root, launch.arguments)
        check(launch, config.training, getattr(config, "model", None))
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        fail("launch", sentence)
    sys.stdout.write(text(launch))


if __name__ == "__main__":
    main(sys.argv[1:])
