from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hasten.artifacts import digest, write_json
from hasten.compression.rtn import Rtn
from hasten.engine.eager import Eager
from hasten.errors import UserError
from hasten.scenario.qa import Qa
from hasten.stages import (
    Compress,
    Confirm,
    Evaluate,
    Finetune,
    Prepare,
    Pretrain,
    Select,
    Stage,
    Sweep,
    check_drafts,
    check_name,
    load_measurements,
    load_plan,
    trial_config,
)
from hasten.training.options import Strategy
from hasten.tuning.full import Full
from tests.tiny import shape, training

CONF = Path(__file__).parents[1] / "conf"


def compress(**changes: Any) -> Compress:
    return Compress(**{"plan": "p", "name": "v", "parent": "variants/baseline", "compression": Rtn(), **changes})


def evaluate(**changes: Any) -> Evaluate:
    return Evaluate(**{"plan": "p", "name": "t", "variant": "v", "engine": Eager(), **changes})


@pytest.mark.parametrize("name", ["default", "int8-llamacpp", "a_b", "7b"])
def test_a_name_is_letters_digits_dashes_and_underscores(name: str) -> None:
    check_name("plan", name)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a@b", "a b", "-a", "a\n", "名"])
def test_any_other_name_is_refused_with_what_was_given(name: str) -> None:
    with pytest.raises(UserError, match="plan must be letters, digits") as error:
        Stage(plan=name)
    assert repr(name) in str(error.value)


def test_paths_follow_from_the_plan() -> None:
    stage = Stage(plan="p")
    assert stage.folder == Path("artifacts/p")
    assert stage.reports == Path("reports/p")
    assert stage.record("pretrain") == Path("artifacts/p/runs/pretrain.json")
    assert stage.record("compress", "int8") == Path("artifacts/p/runs/compress-int8.json")


def test_a_fits_scratch_folder_is_another_one_for_other_work_but_not_for_another_place() -> None:
    def folder(stage: str = "pretrain", tokens: str = "a", **changes: Any) -> Path:
        return Pretrain(plan="p", model=shape(), training=training(**changes)).scratch(stage, {"tokens": tokens})

    others = {
        folder(),
        folder(tokens="b"),
        folder("x"),
        folder(steps=13),
        folder(dropout=0.1),
        folder(mixture={"a": 2}),
    }
    assert len(others) == 6
    assert folder(strategy=Strategy.ddp, processes=2, workers=3, threads=7, checkpoint_every_steps=1) == folder()
    assert all(path.parts[0] == ".work" for path in others)  # not in artifacts: DVC empties those before a stage


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Stage(plan="p", seed=-1), "seed must be 0 or more, got -1"),
        (lambda: Prepare(plan="p"), "corpus must name at least one source"),
        (lambda: Prepare(plan="p", corpus={"a": None}), "task must name at least one task"),  # type: ignore[dict-item]
        (lambda: Prepare(plan="p", validation_fraction=1.0), "validation_fraction must lie between 0 and 1, got 1.0"),
        (lambda: Finetune(plan="p", tuning=Full(), prompt_loss_weight=1.5), "prompt_loss_weight"),
        (lambda: Finetune(plan="p", tuning=Full(), max_tokens=7), "max_tokens must be at least 8, got 7"),
        (lambda: compress(name="a/b"), "name must be letters"),
        (lambda: compress(parent="/etc"), "parent must be a folder of the plan"),
        (lambda: compress(parent="../other/variants/x"), "parent must be a folder of the plan"),
        (lambda: compress(parent="variants/../../other"), "parent must be a folder of the plan"),
        (lambda: evaluate(variant="a@b"), "variant must be letters"),
        (lambda: evaluate(timeout_seconds=0), "timeout_seconds must be above 0, got 0"),
        (lambda: evaluate(memory_limit_gib=-1), "memory_limit_gib must be 0 (nine tenths of the machine's) or more"),
        (lambda: Select(plan="p", timeout_seconds=-1), "timeout_seconds must be above 0, got -1"),
        (lambda: Confirm(plan="p", memory_limit_gib=-0.5), "memory_limit_gib must be 0"),
    ],
)
def test_a_stage_refuses_what_cannot_be_used(make: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)


def test_a_trials_job_reads_the_plans_own_artifacts_on_the_split_asked_for() -> None:
    job = evaluate(name="int8-eager", variant="int8", seed=3, scenario={"qa": Qa()}).job("test")
    assert job.trial == "int8-eager"
    assert job.variant == Path("artifacts/p/variants/int8")
    assert (job.tasks, job.tokens, job.tokenizer) == tuple(
        Path("artifacts/p", name) for name in ("tasks", "tokens", "tokenizer")
    )
    assert (job.splits, job.seed, list(job.scenarios)) == (("test",), 3, ["qa"])


def test_a_sweeps_variants_are_named_after_the_method_and_what_it_was_given() -> None:
    sweep = Sweep(plan="p", parent="variants/baseline", compression=Rtn(), engine=Eager())
    given = ["engine=eager", "compression.group_size=64", "compression.bits=4", "compression=rtn"]
    assert sweep.variant_name(given) == "rtn-bits4-groupsize64"
    assert sweep.variant_name([]) == "rtn"
    check_name("name", sweep.variant_name(["compression.drop=[1,2]"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "params.yaml does not exist"),
        ("a: [1", "params.yaml is not readable YAML"),
        ("- 1", "params.yaml must be a plan"),
        ("plan: x", "params.yaml must be a plan"),
    ],
)
def test_an_unusable_plan_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("params.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        load_plan()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_plans_own_trials_are_read_and_a_missing_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for trial in ("a", "b", "left-over"):
        write_json(Path(f"artifacts/p/measurements/{trial}.json"), {"trial": trial})
    plan: dict[str, Any] = {"plan": "p", "trials": {"b": {}, "a": {}}}
    assert [measurement["trial"] for measurement in load_measurements(plan)] == ["b", "a"]
    with pytest.raises(UserError, match=r"missing\.json does not exist"):
        load_measurements({"plan": "p", "trials": {"missing": {}}})


def test_a_trial_whose_draft_has_changed_since_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("artifacts/p/variants/small")
    write_json(path / "config.json", {"layers": 1})
    old, plain = {"trial": "before drafts were recorded"}, {"trial": "plain", "draft": None}
    drafted = {"trial": "drafted", "draft": {"variant": "small", "hash": digest(path)}}
    check_drafts({"plan": "p"}, [old, plain, drafted])
    write_json(path / "config.json", {"layers": 2})
    words = "trial drafted was measured with another small; dvc repro -f -s evaluate@drafted"
    with pytest.raises(UserError, match=words):
        check_drafts({"plan": "p"}, [old, plain, drafted])


def test_a_trial_of_the_plan_is_composed_as_evaluate_would_be_called_for_it() -> None:
    from hydra import initialize_config_dir

    plan = {
        "plan": "p",
        "scenario": "qa",
        "set": {"evaluate": "scenario.qa.requests=7 seed=5"},
        "trials": {"t": {"variant": "v", "engine": "eager", "set": "engine.weight_dtype=bfloat16 engine.threads=1"}},
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = trial_config(yaml.safe_load(yaml.safe_dump(plan)), "t")
    assert (config.plan, config.name, config.variant, config.seed) == ("p", "t", "v", 5)
    assert isinstance(config.engine, Eager)
    assert config.engine.weights.name == "bfloat16"
    scenario = config.scenario["qa"]
    assert isinstance(scenario, Qa)
    assert scenario.requests == 7


def test_a_fit_needs_a_model_it_can_shape() -> None:
    with pytest.raises(TypeError):
        Pretrain(plan="p", model={}, nonsense=1)  # type: ignore[call-arg, arg-type]
