from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hasten.config import AXES, QUIET, _terminate, camel_case, discover
from hasten.errors import UserError, one_of

ROOT = Path(__file__).parents[1]
TRAINED = "compress.py plan=p name=v parent=checkpoints/tuned"

# command line -> what the one sentence must say
REFUSED = {
    "probe.py": "probe: not set: plan",
    "probe.py plan=p nonsense=1": "probe: Could not override 'nonsense'.",
    "probe.py plan=p +bogus=1": "probe: unknown option: bogus",
    "pretrain.py plan=p +training.bogus=1 +model.more=2": "pretrain: unknown option: model.more, training.bogus",
    "pretrain.py plan=p training.steps=many": "Value 'many' of type 'str' could not be converted to Integer",
    "pretrain.py plan=p training.precision=int3": "Invalid value 'int3', expected one of [auto, float32, bfloat16]",
    "pretrain.py plan=p training.learning_rate=-1": "training.learning_rate must lie between 0 and 10, got -1.0",
    "pretrain.py plan=p training.steps=[1": "no viable alternative at input '[1'",
    "pretrain.py plan=p model=huggingface": "pretrain: model.path must be a folder, ORG/NAME on the",
    "pretrain.py plan=p model=huggingface model.layers=3": "Key 'layers' not in 'Huggingface'",
    "pretrain.py plan=p model=huggingface model.path=package:gemma3-270m": "model.accept_licence=gemma to accept them",
    f"{TRAINED} compression=nonsense": "Could not find 'compression/nonsense'",
    f"{TRAINED} compression=rtn compression.bits=5": "compression.bits must be one of [4, 8], got 5",
    f"{TRAINED} compression=rtn +compression.needs=x": "compress: unknown option: compression.needs",
    TRAINED: "compress: artifacts/p/checkpoints/tuned is not a checkpoint: it has no config.json",
    "prepare.py plan=p corpus=[chitchat] task=[jsonl] +corpus.chitchat.x=1": "unknown option: corpus.chitchat.x",
    "probe.py plan=p/../q": "probe: plan must be letters, digits, '-' and '_', got 'p/../q'",
    "plan.py name=nonsense": "plan: name must be one of ['default'",
    "report.py plan=p": "report: params.yaml does not exist",
    "pretrain.py plan=broken --config-name broken": "pretrain: ",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Every refused command, run as a user would: (exit code, stdout, stderr). Two at a time."""
    folder = tmp_path_factory.mktemp("stages")
    shutil.copytree(ROOT / "conf", folder / "conf")
    (folder / "conf/broken.yaml").write_text("defaults:\n  - base_pretrain\n training: [1\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    commands = [command.split() for command in REFUSED]

    def start(command: list[str]) -> subprocess.Popen[str]:
        program = [sys.executable, str(ROOT / "pipelines" / command[0]), *command[1:]]
        return subprocess.Popen(program, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    found = {}
    for first in range(0, len(commands), 2):
        running = [(" ".join(command), start(command)) for command in commands[first : first + 2]]
        for command, process in running:
            out, err = process.communicate(timeout=120)
            found[command] = (process.returncode, out, err)
    found["left behind"] = (0, " ".join(sorted(path.name for path in folder.iterdir())), "")
    return found


@pytest.mark.parametrize("command", REFUSED)
def test_what_the_user_can_mend_is_one_sentence_and_exit_code_2(
    results: dict[str, tuple[int, str, str]], command: str
) -> None:
    code, out, err = results[command]
    assert code == 2, err
    assert out == ""
    assert REFUSED[command] in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_a_refused_stage_leaves_nothing_behind(results: dict[str, tuple[int, str, str]]) -> None:
    assert results["left behind"][1] == "conf"


def test_a_stage_runs_where_it_is_called_and_leaves_no_files_of_hydras(tmp_path: Path) -> None:
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    command = [sys.executable, str(ROOT / "pipelines/probe.py"), "plan=p"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "conf"]
    assert sorted(path.stem for path in (tmp_path / "artifacts/machine").iterdir()) == sorted(discover("engine"))


STAGE = """
from hasten.config import stage
from hasten.stages import Probe
@stage(Probe)
def main(config):
    {body}
main()
"""


COMMAND = (sys.executable, "script.py", "plan=p")


def write_stage(folder: Path, body: str) -> None:
    """A stage that does `body`, in a folder of its own."""
    (folder / "conf").symlink_to(ROOT / "conf")
    (folder / "script.py").write_text(STAGE.format(body=body))


def stage_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in QUIET and name != "DVC_STAGE"}
    return {**kept, "PYTHONPATH": str(ROOT / "src")}


def run_stage(folder: Path, body: str, **env: str) -> subprocess.Popen[str]:
    write_stage(folder, body)
    return subprocess.Popen(
        COMMAND,
        cwd=folder,
        env=stage_environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    process = run_stage(tmp_path, "{}['nothing']")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in err
    assert "KeyError: 'nothing'" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    process = run_stage(tmp_path, "from pathlib import Path; Path('/dev/full').write_text('x')")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "probe: no space left on the device\n")


def test_sigterm_ends_a_stage_with_143(tmp_path: Path) -> None:
    process = run_stage(tmp_path, "import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(30) == 143


def outlives_its_parent(folder: Path, under_dvc: bool) -> bool:
    """Whether a stage goes on when the process that started it is killed."""
    write_stage(folder, "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    starter = f"import subprocess; subprocess.run({[*COMMAND]!r})"
    env = stage_environment() | ({"DVC_STAGE": "probe"} if under_dvc else {})
    parent = subprocess.Popen([sys.executable, "-c", starter], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    stage = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (30 if under_dvc else 0.5)
    while time.monotonic() < deadline:
        status = Path(f"/proc/{stage}/status")
        if not status.exists() or "State:\tZ" in status.read_text():  # a zombie has ended, nobody asked how
            return False
        time.sleep(0.02)
    os.kill(stage, signal.SIGKILL)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_under_dvc_a_stage_ends_with_the_process_that_started_it_and_by_hand_it_goes_on(tmp_path: Path) -> None:
    for name, under_dvc in (("dvc", True), ("hand", False)):
        (tmp_path / name).mkdir()
        assert outlives_its_parent(tmp_path / name, under_dvc) is not under_dvc


def test_the_signal_handler_never_exits_with_0() -> None:
    with pytest.raises(SystemExit) as stopped:
        _terminate(signal.SIGTERM, None)
    assert stopped.value.code == 143


def test_components_are_found_by_their_modules_name() -> None:
    assert camel_case("question_type") == "QuestionType"
    found = {axis: discover(axis) for axis in AXES}
    assert found["compression"].keys() == {"identity", "rtn", "depth"}
    assert found["engine"].keys() == {"eager", "llamacpp", "native", "openvino", "transformers"}
    for axis, components in found.items():
        assert components, axis
        for name, component in components.items():
            assert component.__name__ == camel_case(name)
            assert component.__module__ == f"hasten.{axis}.{name}"


def test_everything_that_phones_home_is_switched_off_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    process = run_stage(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))", DO_NOT_TRACK="0")
    environment = json.loads(process.communicate(timeout=60)[0])
    assert {name: environment[name] for name in QUIET} == {**QUIET, "DO_NOT_TRACK": "0"}
    assert {"MLFLOW_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS", "HF_HUB_DISABLE_TELEMETRY"} <= QUIET.keys()


def test_the_house_style_of_a_refusal() -> None:
    error = one_of("bits", 5, [4, 8])
    assert isinstance(error, UserError)
    assert isinstance(error, ValueError)
    assert str(error) == "bits must be one of [4, 8], got 5"
