"""What the YAML files promise: complete, known to their dataclass, composable; plans and graph that fit each other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING

from hasten import stages
from hasten.config import AXES, build, discover, model_recipes, register
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.stages import Stage, check_name

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PLANS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "plans").glob("*.yaml"))}
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
LIST_AXES = {"corpus", "task", "scenario"}
ROOTS = {cls.__name__.lower(): cls for cls in vars(stages).values() if isinstance(cls, type) and issubclass(cls, Stage)}
del ROOTS["stage"]
SCHEMAS = {path.stem: yaml.safe_load(path.read_text())["defaults"][0] for path in (CONF / "model").glob("*.yaml")}
COMPONENTS = {(axis, name): component for axis in AXES for name, component in discover(axis).items()} | {
    ("model", name): model_recipes()[schema.removeprefix("base_")] for name, schema in SCHEMAS.items()
}
SELECTED = {*AXES, "model"}  # fields of a stage that another YAML fills in


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    return content


def fields(component: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(component)}


@pytest.fixture(scope="module")
def hydra_conf() -> Iterator[None]:
    for name, root in ROOTS.items():
        register(name, root)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def compose(stage: str, *overrides: str) -> Any:
    return build(ROOTS[stage], hydra.compose(stage, [*needed(stage), *overrides]))


def needed(stage: str) -> list[str]:
    """Values for what a stage must be told."""
    values = {"plan": "p", "name": "n", "variant": "v", "parent": "variants/v"}
    overrides = [
        f"{name}={values[name]}"
        for name, field in fields(ROOTS[stage]).items()
        if field.default is MISSING and name in values
    ]
    return overrides + (["corpus=[chitchat]", "task=[question_type]"] if stage == "prepare" else [])


def test_every_component_has_a_yaml_and_every_yaml_a_component() -> None:
    files = {(path.parent.name, path.stem) for axis in SELECTED for path in (CONF / axis).glob("*.yaml")}
    assert files == COMPONENTS.keys()


@pytest.mark.parametrize("axis_and_name", COMPONENTS, ids="/".join)
def test_a_components_yaml_spells_out_every_option_and_no_other(axis_and_name: tuple[str, str]) -> None:
    axis, name = axis_and_name
    content = load(CONF / axis / f"{name}.yaml")
    defaults = content.pop("defaults")
    base = SCHEMAS[name] if axis == "model" else f"base_{name}"
    assert defaults == [f"{base}@_here_" if axis in LIST_AXES else base, "_self_"]  # the schema first, to be checked
    assert content.keys() == fields(COMPONENTS[axis_and_name]).keys()


@pytest.mark.parametrize("axis_and_name", [key for key in COMPONENTS if key[0] in LIST_AXES], ids="/".join)
def test_a_yaml_of_an_axis_with_several_choices_goes_to_its_own_place(axis_and_name: tuple[str, str]) -> None:
    axis, name = axis_and_name
    assert (CONF / axis / f"{name}.yaml").read_text().startswith(f"# @package {axis}.{name}\n")


def test_every_stage_has_a_yaml_and_an_entry_point() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == ROOTS.keys()
    scripts = {
        match[1]
        for path in (ROOT / "pipelines").glob("*.py")
        for match in re.finditer(r"^@stage\((\w+)\)", path.read_text(), re.MULTILINE)
    }
    assert {name.lower() for name in scripts} == ROOTS.keys()


@pytest.mark.parametrize("stage", ROOTS)
def test_a_stages_yaml_spells_out_every_value_and_no_other(stage: str) -> None:
    content = load(CONF / f"{stage}.yaml")
    defaults = content.pop("defaults")
    assert defaults[0] == f"base_{stage}"
    assert defaults[-1] == "_self_"
    chosen = {next(iter(entry)) for entry in defaults[1:-1]} - {"hydra"}
    options = fields(ROOTS[stage])
    assert chosen == options.keys() & SELECTED
    told = {name for name, field in options.items() if field.default is MISSING} - SELECTED  # by the command line
    assert options.keys() - SELECTED - told <= content.keys() <= options.keys() - SELECTED
    for name, value in content.items():
        if isinstance(value, dict):
            assert value.keys() == fields(options[name].default_factory).keys(), name


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize("stage", ROOTS)
def test_a_stage_composes_with_what_it_must_be_told(stage: str) -> None:
    config = compose(stage)
    assert isinstance(config, ROOTS[stage])
    assert config.seed == 0


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize("axis_and_name", COMPONENTS, ids="/".join)
def test_every_choice_composes_into_its_component(axis_and_name: tuple[str, str]) -> None:
    axis, name = axis_and_name
    stage = next(stage for stage, root in ROOTS.items() if axis in fields(root) and stage != "sweep")
    try:
        config = compose(stage, f"{axis}=[{name}]" if axis in LIST_AXES else f"{axis}={name}")
    except UserError as error:  # what a user must fill in has no default that could work
        assert {"path", "paths", "dataset"} & fields(COMPONENTS[axis_and_name]).keys(), error
        return
    made = getattr(config, axis)
    assert type(made[name] if axis in LIST_AXES else made) is COMPONENTS[axis_and_name]


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize("model", sorted(key[1] for key, component in COMPONENTS.items() if component is ModelConfig))
def test_every_size_is_the_one_its_comment_names(model: str) -> None:
    from hasten.model.cost import Cost

    config = compose("pretrain", f"model={model}").model
    config.vocab_size = config.vocab_size or 8192
    sizes = {"tiny": (3e6, 7e6), "small": (26e6, 30e6), "gpt2": (118e6, 130e6), "1b": (1.2e9, 1.3e9)}
    low, high = sizes[model]
    assert low <= Cost(config).parameters <= high


def test_the_plan_in_force_is_one_of_the_plans() -> None:
    assert (ROOT / "params.yaml").read_text() in {path.read_text() for path in (CONF / "plans").glob("*.yaml")}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_chooses_what_exists(name: str) -> None:
    plan = PLANS[name]
    assert plan["plan"] == name  # the folder it writes to
    chosen = {axis: plan[axis].split(",") for axis in ("corpus", "task", "scenario", "tokenizer", "model", "tuning")}
    assert {(axis, choice) for axis, choices in chosen.items() for choice in choices} <= COMPONENTS.keys()
    assert (ROOT / plan["data"]).exists()
    assert (ROOT / plan["source"]).exists()


@pytest.mark.parametrize("name", PLANS)
def test_a_plans_variants_form_a_graph_from_its_checkpoints(name: str) -> None:
    plan = PLANS[name]
    variants = plan["variants"]
    for key, variant in variants.items():
        check_name("variant", key)
        assert variant.keys() == {"parent", "method", "set"}
        assert ("compression", variant["method"]) in COMPONENTS
        seen, at = [key], variant["parent"]
        while at.startswith("variants/"):
            parent = at.removeprefix("variants/")
            assert parent in variants, f"{key} descends from {parent}, which the plan does not make"
            assert parent not in seen, f"{key} is its own ancestor"
            seen.append(parent)
            at = variants[parent]["parent"]
        assert at in ("checkpoints/base", "checkpoints/tuned")
    assert any(v["method"] == "identity" and v["parent"].startswith("checkpoints/") for v in variants.values())


@pytest.mark.parametrize("name", PLANS)
def test_a_plans_trials_measure_its_variants_on_engines_that_exist(name: str) -> None:
    plan = PLANS[name]
    for key, trial in plan["trials"].items():
        check_name("trial", key)
        assert trial.keys() == {"variant", "engine", "set"}
        assert trial["variant"] in plan["variants"]
        assert ("engine", trial["engine"]) in COMPONENTS
        assert key.startswith(f"{trial['variant']}-{trial['engine']}")
    used = {trial["variant"] for trial in plan["trials"].values()}
    for variant in list(used):
        at = plan["variants"][variant]["parent"]
        while at.startswith("variants/"):
            used.add(at.removeprefix("variants/"))
            at = plan["variants"][at.removeprefix("variants/")]["parent"]
    assert used == plan["variants"].keys()  # none is made for nothing


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_has_a_budget_for_every_stage(name: str) -> None:
    assert PLANS[name]["budget_seconds"].keys() == GRAPH.keys()
    assert all(seconds > 0 for seconds in PLANS[name]["budget_seconds"].values())


@pytest.mark.usefixtures("hydra_conf")
@pytest.mark.parametrize("name", PLANS)
def test_every_override_of_a_plan_composes(name: str) -> None:
    plan = PLANS[name]
    extra = {stage: text.split() for stage, text in plan["set"].items()}
    compose(
        "prepare",
        f"corpus=[{plan['corpus']}]",
        f"task=[{plan['task']}]",
        f"tokenizer={plan['tokenizer']}",
        *extra["prepare"],
    )
    compose("pretrain", f"model={plan['model']}", *extra["pretrain"])
    compose("finetune", f"tuning={plan['tuning']}", *extra["finetune"])
    compose("select", *extra["select"])
    compose("confirm", *extra["confirm"])
    for variant in plan["variants"].values():
        compose("compress", f"parent={variant['parent']}", f"compression={variant['method']}", *variant["set"].split())
    for trial in plan["trials"].values():
        overrides = [*trial["set"].split(), *extra["evaluate"]]
        compose("evaluate", f"engine={trial['engine']}", f"scenario=[{plan['scenario']}]", *overrides)


def test_all_plans_have_the_same_keys() -> None:
    assert len({tuple(sorted(plan)) for plan in PLANS.values()}) == 1
    assert len({tuple(sorted(plan["set"])) for plan in PLANS.values()}) == 1


def commands() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every stage of the graph: its command line and its definition."""
    found = {name: stage.get("do", stage) for name, stage in GRAPH.items()}
    return {name: (stage["cmd"], stage) for name, stage in found.items()}


def watched(stage: dict[str, Any]) -> set[str]:
    """What makes a stage run again: dependencies, and parameter files without the colon."""
    params = {next(iter(entry)) if isinstance(entry, dict) else entry for entry in stage.get("params", [])}
    return params | set(stage.get("deps", []))


@pytest.mark.parametrize("name", GRAPH)
def test_every_choice_in_a_stages_command_is_watched(name: str) -> None:
    command, stage = commands()[name]
    choices = re.findall(r"(?<![\w.])'?(\w+)=(?:\[)?\$\{([\w.]+)\}", command)
    axes = {axis: choice for axis, choice in choices if axis in SELECTED}
    root = ROOTS[name]
    assert axes.keys() == fields(root).keys() & SELECTED  # and none is left to a default that nobody sees
    for axis, choice in axes.items():
        assert {f"conf/{axis}", f"conf/{axis}/${{{choice}}}.yaml"} & watched(stage), axis


@pytest.mark.parametrize("name", GRAPH)
def test_a_stage_watches_its_own_yaml_and_every_plan_override_is_in_its_command(name: str) -> None:
    command, stage = commands()[name]
    script = re.search(r"pipelines/(\w+)\.py", command)
    assert script is not None
    assert (ROOT / "pipelines" / f"{script[1]}.py").is_file()
    if not stage.get("always_changed"):
        assert f"conf/{name}.yaml" in watched(stage)
    if name in PLANS["default"]["set"]:
        assert f"${{set.{name}}}" in command


def instances(name: str, plan: dict[str, Any], part: str) -> list[str]:
    """A stage's dependencies or outputs under a plan, for each of its items."""
    definition = GRAPH[name]
    items = plan[definition["foreach"].strip("${}")] if "foreach" in definition else {"": {}}
    stage = definition.get("do", definition)
    paths = (
        sorted(watched(stage)) if part == "deps" else [o if isinstance(o, str) else next(iter(o)) for o in stage[part]]
    )
    filled = []
    for key, item in items.items():
        values = {**plan, "key": key, **{f"item.{field}": value for field, value in item.items()}}
        filled += [re.sub(r"\$\{([\w.]+)\}", lambda match, v=values: v[match[1]], path) for path in paths]
    return filled


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", GRAPH)
def test_every_path_a_stage_watches_exists_or_is_made_by_a_stage(name: str, plan: str) -> None:
    made = [Path(out) for stage in GRAPH for out in instances(stage, PLANS[plan], "outs")]
    for path in instances(name, PLANS[plan], "deps"):
        if path.startswith("artifacts/"):
            assert any(out.is_relative_to(path) or Path(path).is_relative_to(out) for out in made), path
        else:
            assert path in PLANS[plan] or (ROOT / path).exists(), path


def test_the_graph_passes_on_the_selections_of_the_plan_and_no_unknown_ones() -> None:
    used = set(re.findall(r"\$\{([\w.]+)\}", (ROOT / "dvc.yaml").read_text()))
    known = {"key", "item.parent", "item.method", "item.variant", "item.engine", "item.set", *PLANS["default"]}
    known |= {f"set.{stage}" for stage in PLANS["default"]["set"]}
    assert used <= known
    unused = {key for key in PLANS["default"] if key not in used and not any(f"{key}." in name for name in used)}
    assert unused == {"budget_seconds"}  # read by the stages themselves


def test_hydra_leaves_no_files_of_its_own_in_a_stage() -> None:
    assert load(CONF / "hydra/stage.yaml")["run"]["dir"] == "."
    assert load(CONF / "hydra/stage.yaml")["output_subdir"] is None
    for stage in ROOTS:
        entry = {"hydra": "sweep" if stage == "sweep" else "stage"}
        assert entry in load(CONF / f"{stage}.yaml")["defaults"]
