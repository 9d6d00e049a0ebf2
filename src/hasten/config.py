"""From YAML to components: Hydra composes, dataclasses validate, `src/` never sees a DictConfig.

A component *is* its structured config: one dataclass holds the options (its fields are the YAML's
schema), checks them in `__post_init__` and does the work. Components are found by discovery: every
dataclass named after its module (`rtn.py` -> `Rtn`) in an axis package becomes the schema node
`base_rtn` of that axis' config group, which `conf/compression/rtn.yaml` lists first in its defaults.
"""

from __future__ import annotations

import errno
import importlib
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from inspect import isabstract
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from hasten.errors import EXIT_CODE, TogetherError, UserError
from hasten.ranks import exit_code, rank, started_by_the_first

Root = TypeVar("Root")

AXES = ("corpus", "task", "tokenizer", "tuning", "compression", "engine", "scenario")

# The schemas of the `model` axis: sizes (tiny, small, ...) are many YAMLs of one class, so names are not discovered.
MODELS = {
    "decoder": "hasten.model.config.ModelConfig",
    "huggingface": "hasten.model.imported.Huggingface",
    "lstm": "hasten.model.lstm_config.LstmConfig",
}

# Everything that phones home by default is switched off, in one place, before anything is imported. (No variable stops
# OpenVINO: `hasten.engine.openvino.runtime`.)
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # the default waits four minutes for a server that is not there
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def discover(axis: str) -> dict[str, type]:
    """Components of an axis by name: dataclasses called like their module in CamelCase."""
    package = importlib.import_module(f"hasten.{axis}")
    found: dict[str, type] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if module_info.name == "base":
            continue
        module = importlib.import_module(f"hasten.{axis}.{module_info.name}")
        component = getattr(module, camel_case(module_info.name), None)
        if isinstance(component, type) and is_dataclass(component) and not isabstract(component):
            found[module_info.name] = component
    return found


def model_recipes() -> dict[str, type]:
    """The classes of the `model` axis by the name of their schema: `decoder` is `base_decoder`."""
    found: dict[str, type] = {}
    for name, place in MODELS.items():
        module, _, component = place.rpartition(".")
        found[name] = getattr(importlib.import_module(module), component)
    return found


def camel_case(name: str) -> str:
    """`question_type` -> `QuestionType`."""
    return "".join(part.capitalize() for part in name.split("_"))


def register(stage: str, root: type, axes: tuple[str, ...] = AXES) -> None:
    """Store the schema of a stage and of every component in Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=f"base_{stage}", node=root)
    for axis in axes:
        for name, component in discover(axis).items():
            store.store(group=axis, name=f"base_{name}", node=component)
    for name, recipe in model_recipes().items():
        store.store(group="model", name=f"base_{name}", node=recipe)


def stage(root: type[Root]) -> Callable[[Callable[[Root], Any]], Callable[[], None]]:
    """Decorate an entry point: compose `conf/<stage>.yaml` with the command line, hand over a `root`.

    Whatever the user can mend ends as one sentence on stderr and exit code 2; SIGTERM as 143.
    """
    name = root.__name__.lower()

    def decorate(function: Callable[[Root], Any]) -> Callable[[], None]:
        def entry() -> None:
            die_with_parent()
            os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of Hydra's printer
            signal.signal(signal.SIGTERM, _terminate)
            import hydra
            from hydra.core.hydra_config import HydraConfig
            from hydra.types import RunMode
            from omegaconf import DictConfig

            def run(composed: DictConfig) -> Any:
                try:
                    return function(build(root, composed))
                except (UserError, OSError) as error:
                    sentence = user_sentence(error)
                    if sentence is None or HydraConfig.get().mode is RunMode.MULTIRUN:
                        raise  # the launcher notes the failed job and goes on with the others
                    fail(name, sentence, together=isinstance(error, TogetherError))

            try:
                register(name, root)
                hydra.main(version_base="1.3", config_path=str(Path("conf").absolute()), config_name=name)(run)()
            except Exception as error:
                sentence = user_sentence(error)
                if sentence is None:
                    raise
                fail(name, sentence)

        return entry

    return decorate


def compose(root: type[Root], overrides: list[str]) -> Root:
    """Another stage's config, composed within a running one."""
    import hydra

    name = root.__name__.lower()
    register(name, root)
    return build(root, hydra.compose(config_name=name, overrides=overrides))


def build(root: type[Root], composed: Any) -> Root:
    """The stage's dataclass from what Hydra composed. Raises `UserError` for what is missing or unknown."""
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"not set: {', '.join(missing)}")
    value = OmegaConf.to_object(composed)
    assert isinstance(value, root)
    unknown = sorted(unknown_keys(composed, value))
    if unknown:
        raise UserError(f"unknown option: {', '.join(unknown)}")
    return value


def unknown_keys(composed: Any, value: Any, prefix: str = "") -> list[str]:
    """Keys that `+key=value` smuggled past a dataclass."""
    from omegaconf import DictConfig

    if not isinstance(composed, DictConfig):
        return []
    found: list[str] = []
    for key in composed:
        child = value.get(key) if isinstance(value, dict) else getattr(value, str(key), None)
        known = isinstance(value, dict) or key in options_of(value)
        found += unknown_keys(composed._get_node(key), child, f"{prefix}{key}.") if known else [f"{prefix}{key}"]
    return found


def options_of(component: Any) -> set[str]:
    """The names of a dataclass' fields; what it shares with its class is no option."""
    return {field.name for field in fields(component)} if is_dataclass(component) else set()


def fail(stage_name: str, sentence: str, *, together: bool = False) -> NoReturn:
    """One sentence on stderr, exit code 2. together: all processes of the job say so, so that one is enough."""
    if rank() == 0:
        sys.stderr.write(f"{stage_name}: {sentence}\n")
    elif not together:
        sys.stderr.write(f"{stage_name}: process {rank()}: {sentence}\n")
    sys.exit(exit_code(EXIT_CODE) if together else EXIT_CODE)


def die_with_parent() -> None:
    """End this process when `dvc`, or the first process of a fit, is killed: no orphan writes beside its successor.

    Linux only (PR_SET_PDEATHSIG, prctl(2)); elsewhere an orphan is held off by the stage's lock. Called by hand, a
    stage may outlive its shell (`nohup`).
    """
    if sys.platform != "linux" or not ("DVC_STAGE" in os.environ or started_by_the_first()):
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died while we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # never 0: DVC would take a half-done stage as done


def user_sentence(error: BaseException) -> str | None:
    """The one sentence for an error the user can mend, None for a bug."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    links = [link for link in (error, error.__cause__ or error.__context__) if link is not None]
    for link in links:
        if isinstance(link, UserError):
            return str(link)
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the device{f' to write {link.filename}' if link.filename else ''}"
    if not isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        return None
    # Both libraries append search paths, types and advice; what went wrong comes first.
    ends = ("\nConfig search path", "\n    full_key", "\nSee https", "\n    object_type")
    parts = []
    for link in links:
        message = str(link)
        for end in ends:
            message = message.split(end)[0]
        message = re.sub(r"\s*\bbase_\w+", "", message)  # schemas are no choices
        if message and "$" not in message:
            parts.append(" ".join(message.split()))
    return ": ".join(dict.fromkeys(parts)) or type(error).__name__


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables that hold as long as this lasts, also for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
