"""These start real processes (about half a second each)."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.evaluation import worker
from hasten.evaluation.contention import NOISY_CORES, Contention
from hasten.evaluation.trial import Job, Outcome, death, run
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from hasten.task.base import Item
from hasten.task.data import write_task
from hasten.task.jsonl import Jsonl
from hasten.tokenizer.base import load_tokenizer, write_tokenizer
from tests.fakes import VOCABULARY, FakeEngine, FakeSession, write_tokens, write_variant

QA = Qa(prompt_tokens=16, output_tokens=4, requests=6, warmup=1, minimum_requests=5, patience_seconds=0)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(
        trial="int8@fake",
        variant=write_variant(tmp_path / "int8"),
        engine=FakeEngine(threads=2),
        tasks=tmp_path / "tasks",
        tokens=write_tokens(tmp_path / "tokens", list(range(3, 49))),
        tokenizer=tmp_path / "tokenizer",
        cache=tmp_path / "cache",
        scenarios={"qa": QA},
    )


def with_mode(job: Job, mode: str) -> Job:
    job.cache.mkdir(exist_ok=True)
    return replace(job, engine=FakeEngine(mode=mode))


def write_quiz(job: Job) -> None:
    """A task of two questions, of which the fake engine (`count_up`) answers the first right."""
    import tokenizers

    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<bos>", "<eos>"])
    job.tokenizer.mkdir()
    write_tokenizer(job.tokenizer, backend, {"bos": "<bos>", "eos": "<eos>"}, {}, {})
    right, wrong = Item("1", "1", "en", "w5 w6", "w9"), Item("2", "2", "zh", "w7", "w3")
    items = {"train": [right], "validation": [right, wrong], "test": [right]}
    folder = job.tasks / "quiz"
    folder.mkdir(parents=True)
    write_task(folder, Jsonl(), items, load_tokenizer(job.tokenizer))


def test_a_trial_measures_speed_and_quality_in_another_process(job):
    write_quiz(job)
    outcome = run(replace(job, splits=("validation",)), timeout_seconds=60)
    assert (outcome.status, outcome.error) == ("ok", None)
    assert [(row["task"], row["item_id"], row["output"], row["correct"]) for row in outcome.predictions] == [
        ("quiz", "1", "w9", 1.0),
        ("quiz", "2", "w10", 0.0),
    ]
    assert len(outcome.samples["qa"]) == 6
    assert all(isinstance(sample, Sample) and sample.latency_seconds > 0.0008 for sample in outcome.samples["qa"])
    assert (outcome.native_format, outcome.native, outcome.kernel) == ("fake32", True, "fake")
    assert outcome.load_seconds == 0.01
    assert outcome.peak_memory_bytes is None or outcome.peak_memory_bytes > 2**23
    assert outcome.contention.keys() == {"qa"}


@pytest.mark.parametrize(
    ("mode", "status", "error"),
    [
        ("refuse", "refused", "no such grid"),
        ("raise", "failed", "FloatingPointError: logits are not finite at step 3"),
        ("user_error", "failed", "model.safetensors is not a readable safetensors file"),
        ("exit", "failed", "the process ended with exit code 7 before it could report"),
        ("crash", "failed", "the process crashed (SIGSEGV)"),
        ("kill", "failed", "the process was killed (SIGKILL), most likely because memory ran out"),
        ("crash_on_close", "failed", "the process ended with exit code 9 before it could report"),
        ("short", "failed", "RuntimeError: the engine gave 3 tokens where exactly 4 were asked for"),
    ],
)
def test_whatever_goes_wrong_fails_that_trial_alone_in_one_sentence(job, mode, status, error):
    outcome = run(with_mode(job, mode), timeout_seconds=60)
    assert (outcome.status, outcome.error) == (status, error)
    assert outcome.samples == {}


def test_an_engine_that_gives_impossible_ids_fails(job):
    write_quiz(job)
    outcome = run(replace(with_mode(job, "wrong_ids"), splits=("validation",), scenarios={}), timeout_seconds=60)
    assert outcome.status == "failed"
    assert "token id 57, the vocabulary has 50" in outcome.error


def test_a_trial_that_hangs_is_stopped_with_its_process(job):
    outcome = run(with_mode(job, "hang"), timeout_seconds=3)
    assert (outcome.status, outcome.error) == ("failed", "it was still running after 3 s and was stopped")
    with pytest.raises(ProcessLookupError):
        os.kill(int((job.cache / "pid").read_text()), 0)


def test_building_happens_in_a_process_before_the_measured_one(job):
    outcome = run(with_mode(job, "build"), timeout_seconds=60)
    builder, measured = (job.cache / "built").read_text().split()
    assert builder != measured
    assert outcome.kernel == f"process {measured}"
    assert (outcome.status, outcome.compile_seconds, outcome.why) == ("ok", 1.5, {})


def test_what_an_earlier_run_built_is_measured_at_once_and_says_so(job):
    run(with_mode(job, "build"), timeout_seconds=60)
    outcome = run(with_mode(job, "build"), timeout_seconds=60)
    assert len((job.cache / "built").read_text().split()) == 3
    assert "built by an earlier run" in outcome.why["compile_seconds"]


def test_a_worker_leaves_when_its_parent_is_killed(job, tmp_path):
    """The parent dies without a chance to clean up; the worker must not go on computing beside what runs next."""
    import pickle

    (tmp_path / "job").write_bytes(pickle.dumps(with_mode(job, "hang")))
    code = (
        "import pickle, sys; from pathlib import Path; from hasten.evaluation.trial import run;"
        "run(pickle.loads(Path(sys.argv[1]).read_bytes()), 60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job")], env=environment)
    pid_file = job.cache / "pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not alive(pid))


def wait_until(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_engine_gets_the_threads_it_was_told(job):
    outcome = run(replace(with_mode(job, "threads"), engine=FakeEngine(mode="threads", threads=3)), timeout_seconds=60)
    assert outcome.kernel == "3 3"


def test_a_timeout_must_be_positive(job):
    with pytest.raises(UserError, match="timeout_seconds must be above 0, got 0"):
        run(job, timeout_seconds=0)


@pytest.mark.parametrize(("code", "expected"), [(1, "exit code 1"), (-6, "SIGABRT"), (-9, "memory ran out")])
def test_exit_codes_are_put_in_words(code, expected):
    assert expected in death(code)


def test_an_outcome_survives_the_way_between_processes():
    outcome = Outcome("ok", kernel="k", samples={"qa": [Sample(0.1, 0.2, 0.3, 4, 5, 0.6)]}, contention={"qa": None})
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_scenario_that_needs_more_context_than_the_engine_has_is_refused_before_loading(job):
    short = replace(job, engine=FakeEngine(max_context=19, mode="exit"))
    with pytest.raises(UserError, match="max_context of engine fakes must be at least 20 for scenario qa, got 19"):
        worker.measure(short)


def test_a_plain_checkpoint_is_not_measured(job):
    write_variant(job.variant, kind="checkpoint")
    with pytest.raises(UserError, match="is not a variant"):
        worker.measure(job)


def test_long_errors_are_cut_to_one_line():
    text = worker.sentence(RuntimeError("a\nb " * 300))
    assert text.startswith("RuntimeError: a b a b")
    assert len(text) == worker.LONGEST_ERROR
    assert worker.sentence(SystemExit()) == "SystemExit"


class Played(Contention):
    """Contention as the test says."""

    def __init__(self, cores: float | None) -> None:
        self.cores = cores

    def __exit__(self, *error) -> None:
        """Nothing is read."""


@pytest.mark.parametrize(
    ("cores", "kept", "attempts"),
    [
        ([0.0], 0.0, 1),
        ([None], None, 1),
        ([0.5, NOISY_CORES], NOISY_CORES, 2),
        ([0.5, 0.3, 0.4], 0.3, 3),
    ],
)
def test_a_disturbed_scenario_is_measured_again_and_the_quietest_attempt_counts(monkeypatch, cores, kept, attempts):
    clock = [0.0]

    class Counted(Qa):
        calls = 0

        def measure(self, session, prompts, seed, report):
            type(self).calls += 1
            clock[0] += 4
            return [Counted.calls]

    played = iter(cores)
    monkeypatch.setattr(worker, "Contention", lambda: Played(next(played)))
    monkeypatch.setattr(worker.time, "monotonic", lambda: clock[0])
    samples, watch = worker.quietly(Counted(patience_seconds=14), FakeSession(), None, 0, lambda done, total: None)
    assert watch.cores == kept
    assert Counted.calls == attempts
    assert samples == [cores.index(kept) + 1]


def test_the_waiting_side_loads_no_heavy_library():
    """What it holds and what it runs would disturb the trial it waits for."""
    code = (
        "import sys, hasten.evaluation.trial, hasten.evaluation.measurement, hasten.evaluation.confirmation;"
        "sys.exit(' '.join({'torch', 'numpy', 'pandas', 'scipy', 'pyarrow', 'omegaconf'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) in {(0, ""), (1, "")}
