import json
from dataclasses import replace

import pytest

from hasten.errors import UserError
from hasten.evaluation import worker
from hasten.evaluation.conditions import Conditions
from hasten.evaluation.trial import Call, Job, Turn
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.evaluation.trials import QA, with_mode, write_job
from tests.fakes import FakeEngine, FakeSession, write_variant


@pytest.fixture
def job(tmp_path) -> Job:
    return write_job(tmp_path)


class PlayedError(Exception):
    """No more commands."""


class Script:
    """A line that gives these commands and keeps the answers."""

    def __init__(self, *commands) -> None:
        self.commands, self.answers, self.said = list(commands), [], []

    def receive(self):
        if not self.commands:
            raise PlayedError
        return self.commands.pop(0)

    def answer(self, **fields) -> None:
        self.answers.append(json.loads(json.dumps(fields)))

    def doing(self, what: str) -> None:
        self.said.append(what)


def served(*commands) -> Script:
    script = Script(*commands)
    with pytest.raises(PlayedError):
        worker.serve(script)
    return script


def test_what_a_worker_does_is_said_before_it_does_it(job):
    script = served(Call(job, stop_after_build=False))
    assert script.said == ["loading", "running qa", "closing"]
    assert [answer["outcome"]["status"] for answer in script.answers] == ["ok"]


@pytest.mark.parametrize("kept", [True, False])
def test_only_what_is_kept_is_said_to_be_found_again(job, kept):
    class Compiling(FakeEngine):
        def load(self, variant, cache):
            session = super().load(variant, cache)
            session.compile_seconds, session.kept = 2.0, kept
            return session

    outcome, _ = worker.load(replace(job, engine=Compiling()), Script())
    assert outcome.compile_seconds == 2
    assert ("compile_seconds" in outcome.why) == kept


def test_a_worker_that_cannot_read_its_command_says_so():
    class Broken(Script):
        def receive(self):
            if not self.answers:
                raise ModuleNotFoundError("No module named 'mine'")
            raise PlayedError

    script = Broken()
    with pytest.raises(PlayedError):
        worker.serve(script)
    (answer,) = script.answers
    assert answer["outcome"]["error"] == "ModuleNotFoundError: No module named 'mine'"


def test_a_waiting_worker_answers_turn_by_turn_until_one_fails(job):
    call = Call(job, stop_after_build=False, wait=True)
    script = served(call, Turn("qa", 0), Turn("qa", 1), Turn("chat", 2))
    loaded, first, second, failed = script.answers
    assert (loaded["outcome"]["status"], loaded["outcome"]["speed"]) == ("ok", {})
    assert len(first["samples"]) == len(second["samples"]) == QA.turn_requests
    assert failed["outcome"]["status"] == "failed"


def test_a_waiting_worker_stops_after_building(job):
    script = served(Call(with_mode(job, "build"), stop_after_build=True, wait=True))
    assert [answer["outcome"]["status"] for answer in script.answers] == ["built"]


def test_a_scenario_that_needs_more_context_than_the_engine_has_is_refused_before_loading(job):
    short = replace(job, engine=FakeEngine(max_context=19, mode="exit"))
    with pytest.raises(UserError, match="max_context of engine fakes must be at least 20 for scenario qa, got 19"):
        worker.measure(short, Script())


def test_a_plain_checkpoint_is_not_measured(job):
    write_variant(job.variant, kind="checkpoint")
    with pytest.raises(UserError, match="is not a variant"):
        worker.measure(job, Script())


def test_long_errors_are_cut_to_one_line():
    text = worker.sentence(RuntimeError("a\nb " * 300))
    assert text.startswith("RuntimeError: a b a b")
    assert len(text) == worker.LONGEST_ERROR
    assert worker.sentence(SystemExit()) == "SystemExit"


def test_continuations_come_last_and_need_the_option(job, monkeypatch):
    from hasten.evaluation import continuation

    rows = [{"language": "en", "output": "w4"}]
    monkeypatch.setattr(continuation, "generate", lambda session, asked, report: rows if asked is full else [])
    full = replace(job, continuation=continuation.Continuation(), baseline=job.variant)
    script = Script()
    assert worker.measure(full, script).continuations == rows
    assert script.said == ["loading", "running qa", "continuing texts", "closing"]
    assert worker.measure(job, Script()).continuations == []


class Recorded:
    """A scenario that notes its seeds, and a machine whose every repetition takes 4 s and is as noisy as told."""

    def __init__(self, monkeypatch, noise: list[float | None]) -> None:
        self.seeds: list[int] = []
        left = iter(noise)

        class Watch:
            def __init__(self, devices) -> None:
                self.conditions = Conditions(4.0, 2, next(left))

            def __enter__(self):
                return self

            def __exit__(self, *error) -> None:
                """Nothing is read."""

        monkeypatch.setattr(worker, "Watch", Watch)
        monkeypatch.setattr(Qa, "measure", lambda qa, session, prompts, seed, report: self.measure(seed))

    def measure(self, seed: int) -> list[Sample]:
        """A sample whose prompt is as long as the attempt's number."""
        self.seeds.append(seed)
        return [Sample(0.1, 0.01, 0.2, len(self.seeds), 8, 0.2)]


@pytest.mark.parametrize(
    ("noise", "kept", "attempts"),
    [
        ([0.0], [1], [1]),
        ([None], [1], [1]),
        ([0.5, 0.0], [2], [2]),
        ([0.5, 0.3, 0.4, 0.45], [2], [4]),
        ([0.0, 0.5, 0.4, 0.0, 0.0], [1, 4, 5], [1, 3, 1]),
        ([0.5, 0.4, 0.3, 0.0, 0.5], [4, 5], [4, 1]),
    ],
)
def test_a_disturbed_part_is_measured_again_and_the_quietest_attempt_counts(job, monkeypatch, noise, kept, attempts):
    """Patience is for repeating only, for all parts together: three times 4 s here."""
    recorded = Recorded(monkeypatch, noise)
    scenario = Qa(requests=len(kept), repetitions=len(kept), patience_seconds=12)
    parts = worker.repetitions(job, "qa", scenario, FakeSession(), worker.prompts_of(job))
    assert [sample.prompt_tokens for part in parts for sample in part.samples] == kept
    assert [part.attempts for part in parts] == attempts
    assert len(set(recorded.seeds)) == len(kept), "a part that is measured again gets the same prompts"


@pytest.mark.parametrize("quiet", [True, False])
def test_an_engine_that_hides_part_of_the_wait_fails_where_the_machine_was_quiet(job, monkeypatch, quiet):
    hiding = [Sample(0.1, 0.01, 0.2, 8, 12, 0.4)] * 5
    conditions = Conditions(1.0, 2, 0.0 if quiet else 1.5, 0.0)

    class Played:
        def __init__(self, devices):
            self.conditions = conditions

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(worker, "Watch", Played)
    monkeypatch.setattr(Qa, "measure", lambda *arguments: hiding)
    scenario = replace(QA, patience_seconds=0)
    if quiet:
        with pytest.raises(RuntimeError, match=r"leave out 0\.2"):
            worker.repetitions(job, "qa", scenario, FakeSession(), worker.prompts_of(job))
    else:
        assert worker.repetitions(job, "qa", scenario, FakeSession(), worker.prompts_of(job))[0].samples == hiding
