from dataclasses import replace
from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.evaluation.confirmation import confirm
from hasten.evaluation.trial import Job, Outcome
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.fakes import FakeEngine, write_tokens, write_variant

QA = Qa(requests=10, minimum_requests=20)


def job(trial: str) -> Job:
    folder = Path("unused")
    return Job(trial, Path("variants") / trial, FakeEngine(), folder, folder, folder, folder, scenarios={"qa": QA})


JOBS = {trial: job(trial) for trial in ("base", "int8", "int4")}


class Runner:
    """Plays trials: keeps the order, lets time pass, fails where it is told to."""

    def __init__(
        self, seconds: float = 1.0, fails: dict[tuple[str, str], int] | None = None, cores: float = 0.0
    ) -> None:
        self.now, self.seconds, self.cores = 0.0, seconds, cores
        self.fails = dict(fails or {})
        self.quality: list[str] = []
        self.turns: list[str] = []
        self.jobs: list[Job] = []

    def __call__(self, job: Job, timeout_seconds: float) -> Outcome:
        self.now += self.seconds
        self.jobs.append(job)
        kind = "quality" if job.splits else "speed"
        getattr(self, "turns" if kind == "speed" else kind).append(job.trial)
        left = self.fails.get((job.trial, kind))
        if left is not None:
            self.fails[job.trial, kind] = left - 1
            if left <= 0:
                return Outcome("failed", "it crashed")
        if job.splits:
            return Outcome("ok", predictions=[{"task": "quiz", "split": job.splits[0], "item_id": "a", "correct": 1.0}])
        latency = float(len(self.turns))
        samples = [Sample(0.1, 0.1, latency, 8, 8, latency)] * 10
        return Outcome("ok", kernel="Q8_0", samples={"qa": samples}, contention={"qa": self.cores})

    def clock(self) -> float:
        return self.now


def finalists(*trials: str, reference: str | None = "base") -> dict:
    return {
        "schema": 1,
        "plan": "p",
        "scenarios": {"qa": {"reference": reference, "finalists": list(trials), "rejected": {}}},
    }


def confirmed(runner: Runner, *trials: str, blocks: int = 4, budget_seconds: float = 1000.0):
    return confirm(
        finalists(*trials), JOBS, blocks=blocks, budget_seconds=budget_seconds, runner=runner, clock=runner.clock
    )


def test_reference_and_finalist_take_turns_there_and_back():
    runner = Runner()
    record, _ = confirmed(runner, "int8")
    assert runner.turns == ["base", "int8", "int8", "base"] * 2
    qa = record["scenarios"]["qa"]
    assert (record["schema"], record["plan"], qa["reference"], qa["why"]) == (1, "p", "base", None)
    base, int8 = qa["trials"]["base"], qa["trials"]["int8"]
    # The played latency is the turn's number: a steady drift, which must fall on both alike.
    assert [block[0] for block in base["blocks"]] == [1, 4, 5, 8]
    assert [block[0] for block in int8["blocks"]] == [2, 3, 6, 7]
    assert sum(map(sum, base["blocks"])) == sum(map(sum, int8["blocks"]))
    assert [len(block) for block in base["blocks"]] == [10] * 4
    assert (int8["status"], int8["headline"], int8["kernel"]) == ("ok", "latency_seconds", "Q8_0")


def test_several_finalists_share_the_reference_runs():
    runner = Runner()
    confirmed(runner, "int8", "int4", blocks=2)
    assert runner.turns == ["base", "int8", "int4", "int4", "int8", "base"]


def test_the_test_split_is_answered_once_per_trial_and_never_timed():
    runner = Runner()
    _, rows = confirmed(runner, "int8", "int4")
    assert runner.quality == ["base", "int8", "int4"]
    assert [row["trial"] for row in rows] == ["base", "int8", "int4"]
    assert {row["split"] for row in rows} == {"test"}
    assert all(not (job.splits and job.scenarios) for job in runner.jobs)


def test_every_trial_of_a_round_is_asked_the_same_and_every_round_something_else():
    runner = Runner()
    confirmed(runner, "int8")
    assert [job.seed for job in runner.jobs if job.scenarios] == [0] * 4 + [1] * 4


def test_rounds_stop_when_the_next_would_not_fit_the_budget():
    runner = Runner(seconds=10.0)  # 20 s of quality, 40 s for each round
    record, _ = confirmed(runner, "int8", blocks=10, budget_seconds=130.0)
    assert len(runner.turns) == 8
    assert record["scenarios"]["qa"]["why"] == "the time budget allowed 2 of 5 rounds"


def test_one_round_runs_whatever_the_budget():
    runner = Runner(seconds=100.0)
    record, _ = confirmed(runner, "int8", budget_seconds=1.0)
    assert runner.turns == ["base", "int8", "int8", "base"]
    assert len(record["scenarios"]["qa"]["trials"]["int8"]["blocks"]) == 2


def test_a_finalist_that_fails_is_out_and_the_others_go_on():
    runner = Runner(fails={("int4", "speed"): 1})
    record, _ = confirmed(runner, "int8", "int4")
    assert runner.turns == ["base", "int8", "int4", "int4", "int8", "base", "base", "int8", "int8", "base"]
    trials = record["scenarios"]["qa"]["trials"]
    assert (trials["int4"]["status"], trials["int4"]["error"]) == ("failed", "it crashed")
    assert trials["int8"]["status"] == "ok"


def test_a_finalist_that_cannot_answer_is_not_timed():
    runner = Runner(fails={("int8", "quality"): 0})
    record, _ = confirmed(runner, "int8")
    assert runner.turns == []
    assert record["scenarios"]["qa"]["trials"]["int8"]["status"] == "failed"
    assert record["scenarios"]["qa"]["trials"]["int8"]["validity"] is None


def test_without_the_reference_nothing_more_is_timed():
    runner = Runner(fails={("base", "speed"): 1})
    record, _ = confirmed(runner, "int8")
    assert runner.turns == ["base", "int8", "int8", "base"]
    assert record["scenarios"]["qa"]["trials"]["base"]["status"] == "failed"


def test_without_finalists_only_the_reference_answers():
    runner = Runner()
    record, rows = confirmed(runner)
    assert (runner.turns, runner.quality, len(rows)) == ([], ["base"], 1)
    assert record["scenarios"]["qa"]["trials"]["base"]["blocks"] == []


def test_without_a_reference_there_is_nothing_to_confirm():
    runner = Runner()
    record, rows = confirm(finalists(reference=None), JOBS, blocks=2, budget_seconds=9, runner=runner)
    assert (runner.jobs, rows) == ([], [])
    assert record["scenarios"]["qa"]["trials"] == {}


@pytest.mark.parametrize(("cores", "blocks", "validity"), [(0.0, 2, "valid"), (0.2, 2, "noisy")])
def test_noise_shows_in_the_validity(cores, blocks, validity):
    record, _ = confirmed(Runner(cores=cores), "int8", blocks=blocks)
    assert record["scenarios"]["qa"]["trials"]["int8"]["validity"] == validity


def test_options_out_of_range_and_unknown_trials_are_refused_by_name():
    with pytest.raises(UserError, match="blocks must be an even number of at least 2, got 3"):
        confirmed(Runner(), "int8", blocks=3)
    with pytest.raises(UserError, match="budget_seconds must be above 0, got 0"):
        confirmed(Runner(), "int8", budget_seconds=0)
    with pytest.raises(UserError, match=r"finalists must name trials of this plan .*got 'int2'"):
        confirmed(Runner(), "int2")
    with pytest.raises(UserError, match="scenario must be one that trial base runs"):
        bare = {trial: replace(job, scenarios={}) for trial, job in JOBS.items()}
        confirm(finalists("int8"), bare, blocks=2, budget_seconds=9, runner=Runner())


def test_confirming_in_real_processes_finds_the_faster_one(tmp_path):
    scenario = Qa(prompt_tokens=8, output_tokens=8, requests=5, warmup=1, patience_seconds=0)
    slow = Job(
        trial="base",
        variant=write_variant(tmp_path / "base"),
        engine=FakeEngine(token_seconds=0.006),
        tasks=tmp_path,
        tokens=write_tokens(tmp_path / "tokens", list(range(3, 40))),
        tokenizer=tmp_path,
        cache=tmp_path,
        scenarios={"qa": scenario},
    )
    jobs = {"base": slow, "int8": replace(slow, trial="int8", engine=FakeEngine(token_seconds=0.001))}

    def without_tasks(job: Job, timeout_seconds: float) -> Outcome:
        from hasten.evaluation.trial import run

        return run(job, timeout_seconds) if job.scenarios else Outcome("ok")

    record, _ = confirm(finalists("int8"), jobs, blocks=2, budget_seconds=60, runner=without_tasks)
    trials = record["scenarios"]["qa"]["trials"]
    assert min(min(block) for block in trials["base"]["blocks"]) > max(min(block) for block in trials["int8"]["blocks"])
