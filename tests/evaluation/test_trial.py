"""These start real processes (about a quarter of a second each)."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.evaluation.conditions import Conditions, Repetition
from hasten.evaluation.limits import Limits
from hasten.evaluation.trial import Contestant, Job, Outcome, judged, run
from hasten.hardware import cores
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.evaluation.trials import QA, alive, at_it, time_is_up_when, wait_until, with_mode, write_job, write_quiz
from tests.fakes import FakeEngine

LIMITS = Limits(60.0)
MIB = 2**20


@pytest.fixture
def job(tmp_path) -> Job:
    return write_job(tmp_path)


def test_a_trial_measures_speed_and_quality_in_another_process(job):
    write_quiz(job)
    outcome = run(replace(job, splits=("validation",)), LIMITS)
    assert (outcome.status, outcome.error) == ("ok", None)
    assert [(row["task"], row["item_id"], row["output"], row["correct"]) for row in outcome.predictions] == [
        ("quiz", "1", "w9", 1.0),
        ("quiz", "2", "w10", 0.0),
    ]
    parts = outcome.speed["qa"]
    assert [len(part.samples) for part in parts] == [2, 2, 1, 1]
    assert all(sample.latency_seconds > 0.0008 for part in parts for sample in part.samples)
    assert all(part.attempts == 1 and part.conditions.seconds > 0 for part in parts)
    assert (outcome.native_format, outcome.native, outcome.kernel) == ("fake32", True, "fake")
    assert (outcome.arithmetic, outcome.kv_bytes_per_position) == ("float32", 100)
    assert outcome.load_seconds == 0.01
    assert outcome.peak_memory_bytes is None or outcome.peak_memory_bytes > 2**23
    assert outcome.continuations == []


@pytest.mark.parametrize(
    ("mode", "status", "error"),
    [
        ("refuse", "refused", "no such grid"),
        ("raise", "failed", "FloatingPointError: logits are not finite at step 3"),
        ("user_error", "failed", "model.safetensors is not a readable safetensors file"),
        ("exit", "failed", "the process ended with exit code 7 while loading"),
        ("exit_in_request", "failed", "the process ended with exit code 7 while running qa"),
        ("crash", "failed", "the process crashed (SIGSEGV) while loading"),
        ("crash_on_close", "failed", "the process ended with exit code 9 while closing"),
        ("short", "failed", "RuntimeError: the engine gave 3 tokens where exactly 4 were asked for"),
    ],
)
def test_whatever_goes_wrong_fails_that_trial_alone_in_one_sentence(job, mode, status, error):
    outcome = run(with_mode(job, mode), LIMITS)
    assert (outcome.status, outcome.error) == (status, error)
    assert outcome.speed == {}


def test_a_kill_from_outside_is_not_taken_for_running_out_of_memory(job):
    outcome = run(with_mode(job, "kill"), LIMITS)
    assert outcome.status == "failed"
    assert "SIGKILL" in outcome.error
    if Path("/proc/vmstat").is_file():
        assert outcome.error == "somebody killed the process (SIGKILL) while loading; memory had not run out"


def test_an_engine_that_gives_impossible_ids_fails(job):
    write_quiz(job)
    outcome = run(replace(with_mode(job, "wrong_ids"), splits=("validation",), scenarios={}), LIMITS)
    assert outcome.status == "failed"
    assert "token id 57, the vocabulary has 50" in outcome.error


@pytest.mark.parametrize("split", ["load", "request", "quality"])
def test_the_time_limit_holds_in_every_phase(job, split):
    write_quiz(job)
    doing = {"load": "loading", "request": "running qa", "quality": "answering quiz (validation)"}[split]
    job = with_mode(job, "hang" if split == "load" else "hang_in_request")
    if split == "quality":
        job = replace(job, scenarios={}, splits=("validation",))
    with time_is_up_when(lambda: at_it(doing)):
        outcome = run(job, LIMITS)
    assert (outcome.status, outcome.error) == ("failed", f"it was still {doing} after 60 s and was stopped")


@pytest.mark.parametrize(("mode", "doing"), [("allocate", "loading"), ("allocate_in_request", "running qa")])
def test_a_trial_that_takes_too_much_memory_is_stopped(job, mode, doing):
    outcome = run(with_mode(job, mode), Limits(60.0, 256 * MIB))
    assert outcome.status == "failed"
    assert outcome.error == f"it used more than memory_limit_gib (0.25 GiB) while {doing} and was stopped"


def test_a_trial_that_hangs_is_stopped_with_all_it_started(job):
    pid_file = job.cache / "pid"
    with time_is_up_when(lambda: pid_file.exists() and pid_file.read_text()):
        run(with_mode(job, "hang_with_child"), LIMITS)
    pids = [int(pid) for pid in pid_file.read_text().split()]
    assert len(pids) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)  # not even a zombie
    wait_until(lambda: not any(map(alive, pids)))


def test_chatter_is_no_answer_and_commands_are_no_input(job, capfd):
    outcome = run(with_mode(job, "chatter"), LIMITS)
    assert (outcome.status, outcome.error) == ("ok", None)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count('{"outcome": "mine"') == 20_000


def test_an_answer_may_be_larger_than_any_pipe(job):
    outcome = run(with_mode(job, "huge"), LIMITS)
    assert (outcome.status, len(outcome.memory)) == ("ok", 200_000)


def test_a_full_disk_fails_the_trial_and_leaves_nothing_half_written(job):
    outcome = run(with_mode(job, "full_disk"), LIMITS)
    assert outcome.status == "failed"
    assert outcome.error == f"{job.cache}/built could not be written: no space left on the device"
    assert list(job.cache.iterdir()) == []


def test_building_happens_in_a_process_before_the_measured_one(job):
    outcome = run(with_mode(job, "build"), LIMITS)
    builder, measured = (job.cache / "built").read_text().split()
    assert builder != measured
    assert outcome.kernel == f"process {measured}"
    assert (outcome.status, outcome.compile_seconds, outcome.why.get("compile_seconds")) == ("ok", 1.5, None)


def test_what_an_earlier_run_built_is_measured_at_once_and_says_so(job):
    run(with_mode(job, "build"), LIMITS)
    outcome = run(with_mode(job, "build"), LIMITS)
    assert len((job.cache / "built").read_text().split()) == 3
    assert "built by an earlier run" in outcome.why["compile_seconds"]


@pytest.mark.parametrize("mode", ["hang", "hang_with_lock", "hang_with_child"])
def test_nothing_of_a_trial_outlives_a_parent_that_is_killed(job, tmp_path, mode):
    """It has no chance to clean up; what it left must not go on computing beside what runs next."""
    import pickle

    (tmp_path / "job").write_bytes(pickle.dumps(with_mode(job, mode)))
    code = (
        "import pickle, sys; from pathlib import Path; from hasten.evaluation.trial import Limits, run;"
        "run(pickle.loads(Path(sys.argv[1]).read_bytes()), Limits(60))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job")], env=environment)
    pid_file = job.cache / "pid"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    pids = [int(pid) for pid in pid_file.read_text().split()]
    own_group = [pid for pid in pids if os.getsid(pid) == pids[0]]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(alive, own_group)))
    for stray in set(pids) - set(own_group):  # what left the trial's session on purpose is beyond a guardian's reach
        os.kill(stray, signal.SIGKILL)


def test_every_engine_gets_the_threads_it_was_told(job):
    outcome = run(replace(with_mode(job, "threads"), engine=FakeEngine(mode="threads", threads=3)), LIMITS)
    assert outcome.kernel == "3 3"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not confine processes to cores")
@pytest.mark.parametrize("threads", [1, 2, 0])
def test_a_trial_is_confined_to_as_many_cores_as_it_has_threads(job, threads):
    engine = FakeEngine(threads=threads)
    outcome = run(replace(job, scenarios={}, engine=engine), LIMITS)
    assert outcome.affinity == cores(engine.thread_count)


def test_an_outcome_survives_the_way_between_processes():
    part = Repetition([Sample(0.1, 0.2, 0.3, 4, 5, 0.6)], Conditions(1.0, 2, 0.1, None, why={"steal_cores": "?"}), 2)
    outcome = Outcome("ok", kernel="k", speed={"qa": [part, part]}, affinity=[0, 1])
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_contestants_load_at_once_and_take_turns(job):
    slow = replace(job, engine=FakeEngine(token_seconds=0.02))
    with Contestant(job, LIMITS) as quick, Contestant(slow, LIMITS) as other:
        assert quick.outcome.status == "loading"
        assert (quick.ready().status, other.ready().status) == ("ok", "ok")
        assert quick.ready() is quick.outcome
        assert (quick.outcome.kernel, quick.outcome.speed) == ("fake", {})
        for seed in range(2):
            mine, theirs = quick.turn("qa", seed), other.turn("qa", seed)
            assert len(mine) == len(theirs) == QA.turn_requests
            assert min(s.latency_seconds for s in theirs) >= 4 * 0.02 > min(s.latency_seconds for s in mine)
        with pytest.raises(UserError, match=r"scenario must be one that trial int8@fake runs, \['qa'\], got 'chat'"):
            quick.turn("chat", 0)


def test_a_contestant_builds_in_a_process_before(job):
    with Contestant(with_mode(job, "build"), LIMITS) as contestant:
        outcome = contestant.ready()
        builder, waiting = (job.cache / "built").read_text().split()
        assert (outcome.kernel, outcome.compile_seconds, outcome.why) == (f"process {waiting}", 1.5, {})
        assert builder != waiting
        assert contestant.turn("qa", 0) is not None


@pytest.mark.parametrize(
    ("mode", "status", "error"),
    [
        ("refuse", "refused", "no such grid"),
        ("crash", "failed", "the process crashed (SIGSEGV) while loading"),
        ("hang", "failed", "it was still loading after 60 s and was stopped"),
        ("raise", "failed", "FloatingPointError: logits are not finite at step 3"),
    ],
)
def test_a_contestant_that_cannot_load_is_out(job, mode, status, error):
    up = time_is_up_when(lambda: mode == "hang" and at_it("loading"))
    with Contestant(with_mode(job, mode), LIMITS) as contestant, up:
        outcome = contestant.ready()
        assert (outcome.status, outcome.error) == (status, error)
        assert contestant.turn("qa", 0) is None


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("exit_in_request", "the process ended with exit code 7 while running qa"),
        ("hang_in_request", "it was still running qa after 60 s and was stopped"),
        ("allocate_in_request", "it used more than memory_limit_gib (0.25 GiB) while running qa and was stopped"),
        ("short", "RuntimeError: the engine gave 3 tokens where exactly 4 were asked for"),
    ],
)
def test_a_contestant_that_fails_in_a_turn_is_out_and_the_others_go_on(job, mode, error):
    limits = Limits(60.0, 256 * MIB)
    with Contestant(job, limits) as other, Contestant(with_mode(job, mode), limits) as contestant:
        assert (other.ready().status, contestant.ready().status) == ("ok", "ok")
        with time_is_up_when(lambda: mode == "hang_in_request" and at_it("running qa")):
            assert contestant.turn("qa", 0) is None
        assert (contestant.outcome.status, contestant.outcome.error) == ("failed", error)
        assert contestant.outcome.kernel == "fake"
        assert contestant.turn("qa", 1) is None
        assert other.turn("qa", 1) is not None


def test_memory_is_watched_while_somebody_else_is_waited_for(job):
    slow = replace(job, scenarios={"qa": Qa(prompt_tokens=16, output_tokens=10, turn_requests=1, turn_warmup=0)})
    slow = replace(slow, engine=FakeEngine(token_seconds=0.05))
    limits = Limits(60.0, 256 * MIB)
    with Contestant(slow, limits) as first, Contestant(with_mode(job, "allocate"), limits) as hungry:
        assert first.ready().status == "ok"
        wait_until(lambda: first.turn("qa", 0) is not None and not alive(hungry.pid))
        assert "memory_limit_gib (0.25 GiB) while loading" in hungry.ready().error


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a clock for every process")
def test_waiting_contestants_sleep(job):
    with Contestant(job, LIMITS) as contestant:
        contestant.ready()
        for seed in range(2):  # some milliseconds behind the first answer are spent once
            contestant.turn("qa", seed)
        time.sleep(0.2)  # threads of numeric libraries spin for some milliseconds before they sleep
        before = processor_seconds(contestant.pid)
        time.sleep(0.5)
        assert processor_seconds(contestant.pid) - before < 0.002


def processor_seconds(pid: int) -> float:
    """By the process' own clock (clock_getcpuclockid(3)): the sums in /proc/PID/stat are updated late."""
    return time.clock_gettime(~pid << 3 | 2)


def test_the_waiting_side_loads_no_heavy_library():
    """What it holds and what it runs would disturb the trial it waits for."""
    code = (
        "import sys, hasten.evaluation.trial, hasten.evaluation.measurement, hasten.evaluation.confirmation;"
        "sys.exit(' '.join({'torch', 'numpy', 'pandas', 'scipy', 'pyarrow', 'omegaconf'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) in {(0, ""), (1, "")}


def test_continuations_are_judged_in_a_process_of_their_own(job, monkeypatch):
    rows = [{"language": "en", "prompt_id": "a", "prompt_ids": [3], "output_ids": [4, 5, 6, 7]}]
    outcome = Outcome("ok", kernel="fake", continuations=rows)
    assert judged(replace(job, baseline=None), outcome, Limits(30.0)) == outcome
    empty = Outcome("ok")
    assert judged(replace(job, baseline=job.variant), empty, Limits(30.0)) is empty

    # The fakes' variant holds no weights, so the float baseline cannot be loaded: the trial keeps what it has.
    found = judged(replace(job, baseline=job.variant), outcome, Limits(60.0))
    assert (found.status, found.kernel, found.continuations) == ("ok", "fake", [])
    assert found.why["continuation"].startswith("the float baseline could not judge it: ")


def test_a_baseline_that_does_not_fit_into_memory_leaves_the_trial_as_it_was(job):
    (job.variant / "manifest.json").unlink()
    os.mkfifo(job.variant / "manifest.json")  # whoever reads it waits, until somebody comes
    rows = [{"language": "en", "prompt_id": "a", "prompt_ids": [3], "output_ids": [4, 5, 6, 7]}]
    found = judged(replace(job, baseline=job.variant), Outcome("ok", continuations=rows), Limits(60.0, 2**20))
    assert found.status == "ok"
    assert "it used more than memory_limit" in found.why["continuation"]
