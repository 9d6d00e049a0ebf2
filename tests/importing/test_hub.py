"""Checkpoints from the Hugging Face Hub: what is fetched, in which order, and what is remembered of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.artifacts import read_json, write_json
from hasten.errors import UserError
from hasten.importing.checkpoint import fetch, import_checkpoint
from hasten.model.imported import Huggingface
from hasten.sources import Wanted, resolve
from hasten.tokenizer.base import TrainingText
from hasten.tokenizer.imported import Imported
from tests.importing.arrivals import write_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOTHING = TrainingText({}, lambda: iter(()))


class Hub:
    """One repository, given out as the library does it: links in a snapshot to blobs beside it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]

    def snapshot_download(
        self, name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.revisions.append(revision)
        snapshot, blobs = self.cache / "snapshots" / COMMIT, self.cache / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for file in filter_repo_objects(
            self.list_repo_files(name), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            if not (snapshot / file).exists():
                self.fetched.append(file)
                (blobs / file).write_bytes((self.repository / file).read_bytes())
                (snapshot / file).symlink_to(f"../../blobs/{file}")
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    found = Hub(write_source(tmp_path / "repository"), tmp_path / "models--org--name")
    (found.repository / "LICENSE").write_text("terms")
    (found.repository / "README.md").write_text("---\ntags: []\nlicense: apache-2.0\n---\nlicense: none\n")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt_neox"}, "model_type must be one of"),
        ({"auto_map": {"AutoModel": "modeling.py"}}, "auto_map names code"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config must be absent, got 'awq'"),
    ],
)
def test_what_config_rules_out_costs_no_weights(hub: Hub, fields: dict[str, Any], words: str) -> None:
    write_json(hub.repository / "config.json", {**read_json(hub.repository / "config.json"), **fields})
    with pytest.raises(UserError, match=f"org/name: config.json: {words}"):
        fetch(Huggingface(path="org/name"))
    assert hub.fetched == ["config.json"]


def test_the_weights_are_of_the_commit_whose_config_was_checked(hub: Hub) -> None:
    folder = fetch(Huggingface(path="org/name", revision="v1"))
    assert hub.revisions == ["v1", COMMIT]
    assert (folder / "model.safetensors").is_file()


def test_a_config_and_a_tokenizer_are_fetched_without_weights(hub: Hub, tmp_path: Path) -> None:
    resolve("org/name", wanted=Wanted.config)
    assert hub.fetched == ["config.json"]
    (tmp_path / "tokenizer").mkdir()
    Imported(path="org/name").build(NOTHING, tmp_path / "tokenizer")
    assert "model.safetensors" not in hub.fetched
    source = read_json(tmp_path / "tokenizer/manifest.json")["source"]
    assert (source["path"], source["commit"], source["licence"]) == ("org/name", COMMIT, "apache-2.0")
    assert (tmp_path / "tokenizer/LICENSE").read_text() == "terms"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub: Hub, name: str) -> None:
    (hub.repository / "model.safetensors").rename(hub.repository / name)
    with pytest.raises(UserError, match=rf"model\.path=org/name: {name} would run code .*save_pretrained\(NEW_DIR\)"):
        resolve("org/name")
    assert hub.fetched == []


def test_pickles_beside_safetensors_do_no_harm(hub: Hub) -> None:
    (hub.repository / "pytorch_model.bin").write_bytes(b"code")
    (hub.repository / "LICENSE.bin").write_bytes(b"code")
    folder = resolve("org/name")
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.glob("*.bin"))


def test_the_manifest_says_which_commit_under_which_licence(hub: Hub, tmp_path: Path) -> None:
    recipe = Huggingface(path="org/name", verify_tokens=0)
    source = fetch(recipe)
    import_checkpoint(source, source, recipe, tmp_path / "base")
    said = read_json(tmp_path / "base/manifest.json")["source"]
    assert len(said.pop("sha256")) == 64
    named = {"path": "org/name", "revision": "", "commit": COMMIT}
    assert said == {**named, "licence": "apache-2.0", "model_type": "llama"}
    assert (tmp_path / "base/LICENSE").read_text() == "terms"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: other\nlicense_name: 'own terms'\n---\n", "own terms"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),
    ],
)
def test_a_licence_is_what_the_front_matter_names(hub: Hub, tmp_path: Path, card: str, licence: str | None) -> None:
    (hub.repository / "README.md").write_text(card)
    Imported(path="org/name").build(NOTHING, tmp_path)
    assert read_json(tmp_path / "manifest.json")["source"].get("licence") == licence


def test_offline_what_is_cached_may_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
            raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi", Offline)
    assert (fetch(Huggingface(path="org/name")) / "model.safetensors").is_file()


def test_a_local_source_leaves_no_path_behind(tmp_path: Path) -> None:
    one, other = (write_source(tmp_path / name / "source") for name in ("one", "other"))
    for source in (one, other):
        import_checkpoint(source, source, Huggingface(path=str(source), verify_tokens=0), source.with_name("base"))
    first, second = (source.with_name("base") / "manifest.json" for source in (one, other))
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in first.read_text()
