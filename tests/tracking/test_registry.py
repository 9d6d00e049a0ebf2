from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from hasten.artifacts import load_checkpoint, read_json, write_json
from hasten.engine.eager import Eager
from hasten.engine.native import Native
from hasten.tokenizer.base import load_tokenizer
from hasten.tracking.registry import register_champions
from tests.tiny import decoder, write_variant

VERDICT = Path("reports/p/verdict.json")


def verdict(champion: str | None, decision: str = "non-inferior", sentence: str = "variant wins") -> Path:
    entry = {"champion": champion, "reference": "baseline-eager", "decision": decision, "sentence": sentence}
    write_json(VERDICT, {"schema": 1, "plan": "p", "scenarios": {"qa": entry}})
    return VERDICT


def trial(variant: str, seed: int) -> str:
    """A measured trial of a tiny variant on the eager engine."""
    write_variant(Path("artifacts/p/variants", variant), decoder(seed=seed))
    name = f"{variant}-eager"
    options = Eager(threads=1, max_context=32).describe()
    facts = {"trial": name, "variant": variant, "engine": "eager", "lineage": ["baseline", variant], "options": options}
    write_json(Path(f"artifacts/p/measurements/{name}.json"), facts)
    return name


def versions(store: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(store) as database:
        return database.execute("select name, version from model_versions order by version").fetchall()


def champion() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient().get_model_version_by_alias("hasten-p-qa", "champion")


def test_the_champion_is_registered_once_answers_text_and_gives_way_to_the_next(store: Path) -> None:
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(f"sqlite:///{store}")
    first, second = trial("int8", 0), trial("int4", 1)
    assert register_champions(verdict(first, sentence="int8 wins")) == ["hasten-p-qa"]
    current = champion()
    assert current.description == "int8 wins"
    assert {key: current.tags[key] for key in ("trial", "engine", "lineage", "decision", "verdict")} == {
        "trial": "int8-eager",
        "engine": "eager",
        "lineage": "baseline > int8",
        "decision": "non-inferior",
        "verdict": "int8 wins",
    }
    variant = load_checkpoint(Path("artifacts/p/variants/int8"))
    assert current.tags["variant_sha256"] == variant.hash

    # The same champion again: nothing new, but what is said of it is brought up to date.
    assert register_champions(verdict(first, sentence="int8 wins again")) == []
    assert versions(store) == [("hasten-p-qa", 1)]
    assert champion().tags["verdict"] == "int8 wins again"

    loaded = mlflow.pyfunc.load_model("models:/hasten-p-qa@champion")
    prompts = ["w5 w6 w7", "w9"]
    answers = loaded.predict(pd.DataFrame({"prompt": prompts}), params={"max_tokens": 5})
    assert answers == [expected(variant.path, prompt, 5) for prompt in prompts]
    assert loaded.predict(["w9"]) == [expected(variant.path, "w9", 30)]  # all that its context of 32 has room for
    assert loaded.predict("w9") == [expected(variant.path, "w9", 30)]

    assert register_champions(verdict(second)) == ["hasten-p-qa"]
    assert versions(store) == [("hasten-p-qa", 1), ("hasten-p-qa", 2)]
    assert champion().tags["trial"] == "int4-eager"


def expected(folder: Path, prompt: str, most: int) -> str:
    from hasten.engine.base import Request

    reader = load_tokenizer(folder)
    session = Eager(threads=1, max_context=32).load(load_checkpoint(folder), folder)  # type: ignore[arg-type]
    request = Request(0, reader.prompt_ids(prompt), most, frozenset([reader.eos_id]))
    return reader.decode([token.id for token in session.submit(request)])


def test_a_champions_draft_comes_with_it_and_lies_beside_it(store: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{store}")
    name = trial("int4", 1)
    write_variant(Path("artifacts/p/variants/shallow"), decoder(seed=2))
    path = Path(f"artifacts/p/measurements/{name}.json")
    engine = Native(draft="shallow", guesses=3)
    write_json(path, {**read_json(path), "options": engine.describe(), "draft": {"variant": "shallow"}})
    register_champions(verdict(name))
    found = Path(mlflow.artifacts.download_artifacts("models:/hasten-p-qa@champion"), "artifacts")
    draft = engine.draft_of(load_checkpoint(found / "int4"))  # type: ignore[arg-type]
    assert draft is not None
    assert draft.hash == load_checkpoint(Path("artifacts/p/variants/shallow")).hash


def test_a_champion_whose_draft_or_variant_is_gone_is_left_alone(store: Path) -> None:
    name = trial("int4", 1)
    path = Path(f"artifacts/p/measurements/{name}.json")
    write_json(path, {**read_json(path), "draft": {"variant": "shallow"}})
    assert register_champions(verdict(name)) == []
    write_json(path, {key: value for key, value in read_json(path).items() if key != "draft"})
    shutil.rmtree("artifacts/p/variants/int4")
    assert register_champions(verdict(name)) == []
    assert versions(store) == []


@pytest.mark.usefixtures("store")
def test_no_champion_or_one_whose_files_are_gone_registers_nothing(store: Path) -> None:
    assert register_champions(verdict(None)) == []
    assert register_champions(verdict("never-measured")) == []
    assert versions(store) == []
