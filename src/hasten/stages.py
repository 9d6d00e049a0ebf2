"""The stages' configs: what each entry point in `pipelines/` can be told.

Values live in `conf/<stage>.yaml`; selections (which model, which method) come from `params.yaml`
through the commands in `dvc.yaml`. Paths follow from the plan's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from hasten.artifacts import Json, digest, read_json
from hasten.compression.base import Compressor
from hasten.compression.shared.calibration import Calibrate
from hasten.corpus.base import Source
from hasten.engine.base import Engine
from hasten.errors import UserError
from hasten.evaluation.bits_per_byte import BitsPerByte
from hasten.evaluation.confirmation import Together
from hasten.evaluation.continuation import Continuation
from hasten.evaluation.limits import Limits
from hasten.evaluation.trial import Job
from hasten.model.recipe import ModelRecipe
from hasten.scenario.base import Scenario
from hasten.task.base import Task
from hasten.tokenizer.base import TokenizerRecipe
from hasten.training.options import PLACEMENT, Training
from hasten.tuning.base import Tuning

if TYPE_CHECKING:
    import pandas as pd


def check_name(field_name: str, value: str) -> None:
    """Names become folders, DVC stage names and registered models."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise UserError(f"{field_name} must be letters, digits, '-' and '_', got {value!r}")


def check_parent(value: str) -> None:
    """A parent lies below the plan's artifacts."""
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise UserError(f"parent must be a folder of the plan, such as variants/baseline, got {value!r}")


@dataclass
class Stage:
    """What every stage has: the plan's name (a folder) and the seed of everything random."""

    plan: str = MISSING
    seed: int = 0

    def __post_init__(self) -> None:
        check_name("plan", self.plan)
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, got {self.seed}")

    @property
    def folder(self) -> Path:
        """Where this plan's artifacts live."""
        return Path("artifacts", self.plan)

    @property
    def reports(self) -> Path:
        """Where this plan's reports live."""
        return Path("reports", self.plan)

    def record(self, stage: str, item: str = "") -> Path:
        """Where the record of this stage's run goes."""
        return self.folder / "runs" / (f"{stage}-{item}.json" if item else f"{stage}.json")

    def scratch(self, stage: str, inputs: Mapping[str, str]) -> Path:
        """Where a fit keeps its running checkpoint: named by all that decides its result, not by where it runs."""
        from hasten.tracking.run import flat

        decides = {name: value for name, value in flat(self).items() if name.removeprefix("training.") not in PLACEMENT}
        content = json.dumps([stage, decides, dict(inputs)], sort_keys=True, default=str)
        return Path(".work", "fits", f"{stage}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")


class Limited:
    """For stages that measure in processes of their own: what each of them may take.

    timeout_seconds: in all for a trial, or for loading and for each turn where trials take turns. memory_limit_gib:
    physical memory of the process with all it starts, 0 means nine tenths of the machine's. Beyond either it is killed
    and has failed.
    """

    timeout_seconds: float
    memory_limit_gib: float

    @property
    def limits(self) -> Limits:
        """Raises `UserError` for values that are no limits."""
        return Limits.of(self.timeout_seconds, self.memory_limit_gib)


def check_limits(stage: Limited) -> None:
    """What a stage allows its processes must be something that can be allowed."""
    _ = stage.limits


@dataclass
class Probe(Stage):
    """Which engines to describe: all of them, always."""


@dataclass
class Prepare(Stage):
    """Corpora and tasks to tokens. workers: processes that tokenise, 0 means all cores."""

    corpus: dict[str, Source] = field(default_factory=dict)
    task: dict[str, Task] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = MISSING
    validation_fraction: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if not self.corpus:
            raise UserError("corpus must name at least one source, for example corpus=[chitchat]")
        if not self.task:
            raise UserError("task must name at least one task, for example task=[question_type]")


@dataclass
class Pretrain(Stage):
    """Tokens to a base model: a shape is trained, a source is imported."""

    model: ModelRecipe = MISSING
    training: Training = field(default_factory=Training)


@dataclass
class Finetune(Stage):
    """A base model and tasks to a tuned model.

    prompt_loss_weight: how much predicting the prompt counts beside predicting the completion. rehearsal: which share
    of the loss is that of pre-training text, so that the model does not unlearn to write. max_tokens: the longest item.
    """

    tuning: Tuning = MISSING
    training: Training = field(default_factory=Training)
    prompt_loss_weight: float = 0.0
    rehearsal: float = 0.0
    max_tokens: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prompt_loss_weight <= 1:
            raise UserError(f"prompt_loss_weight must lie between 0 and 1, got {self.prompt_loss_weight}")
        if not 0 <= self.rehearsal < 1:
            raise UserError(f"rehearsal must be at least 0 and below 1, got {self.rehearsal}")
        if self.max_tokens < 8:
            raise UserError(f"max_tokens must be at least 8, got {self.max_tokens}")


@dataclass
class Compress(Stage):
    """A parent (a folder below the plan's artifacts) to a variant."""

    name: str = MISSING
    parent: str = MISSING
    compression: Compressor = MISSING
    calibration: Calibrate = field(default_factory=Calibrate)
    bits_per_byte: BitsPerByte = field(default_factory=BitsPerByte)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("name", self.name)
        check_parent(self.parent)


@dataclass
class Evaluate(Stage, Limited):
    """A variant on an engine to a measurement."""

    name: str = MISSING
    variant: str = MISSING
    engine: Engine = MISSING
    scenario: dict[str, Scenario] = field(default_factory=dict)
    continuation: Continuation = field(default_factory=Continuation)
    timeout_seconds: float = 600.0
    memory_limit_gib: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self)
        check_name("name", self.name)
        check_name("variant", self.variant)

    def job(self, split: str) -> Job:
        """What to measure, on one split of every task."""
        return Job(
            trial=self.name,
            variant=self.folder / "variants" / self.variant,
            engine=self.engine,
            tasks=self.folder / "tasks",
            tokens=self.folder / "tokens",
            tokenizer=self.folder / "tokenizer",
            cache=Path(".work", "engines"),
            splits=(split,),
            scenarios=self.scenario,
            seed=self.seed,
            baseline=self.folder / "checkpoints" / "tuned",
            continuation=self.continuation,
        )


@dataclass
class Select(Stage, Limited):
    """Measurements to finalists.

    Margins, in points of accuracy, are declared before anything is looked at. finalists: how many go
    on to be confirmed, per scenario. passes: turns there and back of the round that qualifies for it, 0 means that
    screening alone decides. qualifiers: how many trials take part in that round, at most. time_budget_seconds: no
    further pass starts after it.
    """

    margin_points: float = 2.0
    language_margin_points: float = 3.0
    finalists: int = 2
    passes: int = 4
    qualifiers: int = 6
    time_budget_seconds: float = 60.0
    timeout_seconds: float = 600.0
    memory_limit_gib: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self)


@dataclass
class Confirm(Stage, Limited):
    """Finalists against the reference.

    rounds: of fresh processes, before the first look at their spread. passes: turns there and back in each of them.
    precision_percent: the half width of the speed-up's interval at which it is enough. time_budget_seconds: for the
    rounds, none starts after it; answering the test split comes before them. together: whether a round's trials are
    loaded at the same time. Scenarios and their options are those the trials were evaluated with.
    """

    rounds: int = 6
    passes: int = 8
    precision_percent: float = 3.0
    time_budget_seconds: float = 100.0
    together: Together = Together.auto
    timeout_seconds: float = 600.0
    memory_limit_gib: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self)


@dataclass
class Report(Stage):
    """Everything to a verdict."""


@dataclass
class Sweep(Stage, Limited):
    """One job of a sweep: a method applied to `parent` (a folder of the plan's artifacts), on an engine."""

    parent: str = MISSING
    compression: Compressor = MISSING
    calibration: Calibrate = field(default_factory=Calibrate)
    bits_per_byte: BitsPerByte = field(default_factory=BitsPerByte)
    engine: Engine = MISSING
    scenario: dict[str, Scenario] = field(default_factory=dict)
    timeout_seconds: float = 600.0
    memory_limit_gib: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self)
        check_parent(self.parent)

    def variant_name(self, overrides: list[str]) -> str:
        """What this job's variant is called: the method and the values it was given, such as `rtn-bits4`."""
        given = [text.removeprefix("compression.") for text in sorted(overrides) if text.startswith("compression.")]
        return "-".join([self.compression.name, *(re.sub(r"[^A-Za-z0-9]", "", text) for text in given)])


def load_plan() -> dict[str, Any]:
    """The plan in force, `params.yaml`. Raises `UserError` if it is missing or malformed."""
    import yaml

    path = Path("params.yaml")
    if not path.is_file():
        raise UserError("params.yaml does not exist; `make repro PLAN=default` puts a plan in place")
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"params.yaml is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plan, dict) or not isinstance(plan.get("trials"), dict):
        raise UserError("params.yaml must be a plan with variants and trials")
    return plan


def trial_config(plan: dict[str, Any], trial: str) -> Evaluate:
    """A trial of the plan as `evaluate` would be called for it."""
    from hasten.config import compose

    item = plan["trials"][trial]
    overrides = [f"plan={plan['plan']}", f"name={trial}", f"variant={item['variant']}", f"engine={item['engine']}"]
    overrides += [f"scenario=[{plan['scenario']}]", *item["set"].split(), *plan["set"]["evaluate"].split()]
    return compose(Evaluate, overrides)


def load_measurements(plan: dict[str, Any]) -> list[Json]:
    """The measurements of the plan's trials, and of no others that may lie in the folder."""
    folder = Path("artifacts", plan["plan"], "measurements")
    return [read_json(folder / f"{trial}.json") for trial in plan["trials"]]


def check_drafts(plan: dict[str, Any], measurements: Sequence[Json]) -> None:
    """Raises `UserError` if a trial's draft has changed since: DVC knows that it depends on its variant, no more."""
    for measurement in measurements:
        if draft := measurement.get("draft"):
            trial, name = measurement["trial"], draft["variant"]
            if digest(Path("artifacts", plan["plan"], "variants", name)) != draft["hash"]:
                raise UserError(f"trial {trial} was measured with another {name}; dvc repro -f -s evaluate@{trial}")


def load_all_predictions(plan: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The predictions of the plan's trials, by trial."""
    from hasten.evaluation.quality import load_predictions

    folder = Path("artifacts", plan["plan"], "predictions")
    return {trial: load_predictions(folder / f"{trial}.parquet") for trial in plan["trials"]}
