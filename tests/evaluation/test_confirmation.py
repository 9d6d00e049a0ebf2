from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.errors import UserError
from hasten.evaluation.conditions import Conditions
from hasten.evaluation.confirmation import Together, confirm, why_apart
from hasten.evaluation.limits import Limits
from hasten.evaluation.trial import Job, Outcome
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.fakes import FakeEngine, write_tokens, write_variant

QA = Qa(requests=10, minimum_requests=20)
LIMITS = Limits(60.0)
SPEED = {"base": 0.2, "int8": 0.1, "int4": 0.05}


def job(trial: str) -> Job:
    folder = Path("unused")
    return Job(trial, Path("variants") / trial, FakeEngine(), folder, folder, folder, folder, scenarios={"qa": QA})


JOBS = {trial: job(trial) for trial in SPEED}


class Machine:
    """Plays trials: lets time pass, drifts, fails where it is told to (trial: at which of its turns)."""

    def __init__(
        self,
        seconds: float = 1.0,
        fails: Mapping[str, int] | None = None,
        dumb: tuple[str, ...] = (),
        cores: float = 0.0,
        drift: tuple[float, ...] = (1.0,),
    ) -> None:
        self.now, self.seconds, self.cores, self.drift = 0.0, seconds, cores, drift
        self.fails, self.dumb = dict(fails or {}), dumb
        self.answered: list[Job] = []
        self.rounds: list[list[str]] = []
        self.turns: list[str] = []

    def clock(self) -> float:
        return self.now

    def run(self, job: Job, limits: Limits) -> Outcome:
        self.now += self.seconds
        self.answered.append(job)
        if job.trial in self.dumb:
            return Outcome("failed", "it cannot answer")
        return Outcome("ok", predictions=[{"task": "quiz", "split": job.splits[0], "item_id": "a", "correct": 1.0}])

    def table(self, jobs: Mapping[str, Job], scenario: str, limits: Limits) -> "PlayedTable":
        self.now += self.seconds
        self.rounds.append(list(jobs))
        return PlayedTable(self)


class PlayedTable:
    """It is its own watch, too: the machine does what it is told."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.failed: dict[str, Outcome] = {}
        self.kernels: dict[str, str | None] = {}

    @property
    def conditions(self) -> Conditions:
        return Conditions(1.0, 2, self.machine.cores, 0.0)

    def watch(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def turn(self, trial: str, seed: int) -> list[Sample] | None:
        machine = self.machine
        machine.now += machine.seconds
        machine.turns.append(trial)
        self.kernels[trial] = "Q8_0"
        if machine.turns.count(trial) == machine.fails.get(trial):
            self.failed[trial] = Outcome("failed", "it crashed")
            return None
        drift = machine.drift[len(machine.rounds) % len(machine.drift)] if trial == "int8" else 1.0
        seconds = SPEED[trial] * drift * (1 + len(machine.turns) / 100)
        return [Sample(seconds / 2, seconds / 20, seconds, 8, 8, seconds)] * 4


def finalists(*trials: str, reference: str | None = "base") -> dict:
    entry = {"reference": reference, "finalists": list(trials), "rejected": {}}
    return {"schema": 1, "plan": "p", "scenarios": {"qa": entry}}


def confirmed(machine: Machine, *trials: str, **options):
    settings = {"rounds": 2, "passes": 2, "precision": 0.5, "budget_seconds": 1000.0} | options
    return confirm(
        finalists(*trials), JOBS, limits=LIMITS, runner=machine.run, side_by_side=machine.table, clock=machine.clock,
        **settings,
    )  # fmt: skip


def test_every_round_holds_the_passes_of_everybody():
    machine = Machine()
    record, _ = confirmed(machine, "int8", "int4")
    assert machine.rounds == [["base", "int8", "int4"]] * 2
    qa = record["scenarios"]["qa"]
    assert (record["schema"], record["plan"], qa["reference"], qa["why"], qa["together"]) == (
        1,
        "p",
        "base",
        None,
        True,
    )
    int8 = qa["trials"]["int8"]
    assert [[len(one) for one in passes] for passes in int8["rounds"]] == [[8, 8], [8, 8]]
    assert (int8["status"], int8["headline"], int8["kernel"]) == ("ok", "latency_seconds", "Q8_0")
    assert [len(passes) for passes in qa["conditions"]] == [2, 2]
    assert (qa["rounds_first_stage"], qa["rounds_wanted"]) == (2, 2)


def test_rounds_go_on_until_the_first_stage_s_spread_says_it_is_enough():
    steady, unsteady = Machine(), Machine(drift=(1.0, 1.02))
    confirmed(steady, "int8", precision=0.05)
    narrow, _ = confirmed(unsteady, "int8", precision=0.05)
    assert len(steady.rounds) == 2
    assert len(unsteady.rounds) == narrow["scenarios"]["qa"]["rounds_wanted"] > 2
    assert narrow["scenarios"]["qa"]["rounds_first_stage"] == 2


def test_the_time_budget_ends_it_and_says_so():
    machine = Machine(seconds=10.0, drift=(1.0, 1.5))  # 20 s of answering, which do not count, 90 s for each round
    record, _ = confirmed(machine, "int8", precision=0.001, budget_seconds=280.0)
    assert len(machine.rounds) == 3
    assert record["scenarios"]["qa"]["why"].startswith("the time budget allowed 3 of ")


def test_one_round_is_played_whatever_the_budget():
    machine = Machine(seconds=100.0)
    record, _ = confirmed(machine, "int8", budget_seconds=1.0)
    assert len(machine.rounds) == 1
    assert record["scenarios"]["qa"]["rounds_first_stage"] == 1


def test_a_round_that_outlasts_the_budget_ends_with_the_passes_it_has():
    machine = Machine(seconds=10.0)  # 40 s for each pass, a hundred of them
    record, _ = confirmed(machine, "int8", passes=100, budget_seconds=130.0)
    rounds = record["scenarios"]["qa"]["trials"]["int8"]["rounds"]
    assert [len(passes) for passes in rounds] == [3]
    assert record["scenarios"]["qa"]["why"] == "the time budget allowed 1 of 2 rounds"


def test_the_test_split_is_answered_once_per_trial_and_never_timed():
    machine = Machine()
    _, rows = confirmed(machine, "int8", "int4")
    assert [(one.trial, one.splits, one.scenarios) for one in machine.answered] == [
        (trial, ("test",), {}) for trial in ("base", "int8", "int4")
    ]
    assert [row["trial"] for row in rows] == ["base", "int8", "int4"]


def test_a_finalist_that_dies_in_a_round_is_out_and_the_others_go_on():
    machine = Machine(fails={"int4": 3})
    record, _ = confirmed(machine, "int8", "int4")
    assert machine.rounds == [["base", "int8", "int4"], ["base", "int8"]]
    trials = record["scenarios"]["qa"]["trials"]
    assert (trials["int4"]["status"], trials["int4"]["error"]) == ("failed", "it crashed")
    assert [len(passes) for passes in trials["int8"]["rounds"]] == [2, 2]
    assert [len(passes) for passes in trials["base"]["rounds"]] == [2, 2]


def test_a_finalist_that_cannot_answer_is_not_timed():
    machine = Machine(dumb=("int8",))
    record, _ = confirmed(machine, "int8")
    assert machine.turns == []
    int8 = record["scenarios"]["qa"]["trials"]["int8"]
    assert (int8["status"], int8["validity"], int8["rounds"]) == ("failed", None, [])


def test_without_the_reference_nothing_more_is_timed():
    machine = Machine(fails={"base": 2})
    record, _ = confirmed(machine, "int8")
    assert (len(machine.rounds), machine.turns.count("base")) == (1, 2)
    assert record["scenarios"]["qa"]["trials"]["base"]["status"] == "failed"


def test_without_finalists_only_the_reference_answers():
    machine = Machine()
    record, rows = confirmed(machine)
    assert (machine.rounds, len(rows)) == ([], 1)
    assert record["scenarios"]["qa"]["trials"]["base"]["rounds"] == []


def test_without_a_reference_there_is_nothing_to_confirm():
    machine = Machine()
    record, rows = confirm(
        finalists(reference=None), JOBS, rounds=2, passes=2, precision=0.1, budget_seconds=9, limits=LIMITS,
        runner=machine.run, side_by_side=machine.table,
    )  # fmt: skip
    assert (machine.answered, rows) == ([], [])
    assert record["scenarios"]["qa"]["trials"] == {}


@pytest.mark.parametrize(("cores", "validity"), [(0.0, "valid"), (1.0, "noisy")])
def test_a_machine_that_never_gets_quiet_shows_in_the_validity(cores, validity):
    record, _ = confirmed(Machine(cores=cores), "int8")
    assert record["scenarios"]["qa"]["trials"]["int8"]["validity"] == validity


@pytest.mark.parametrize(("rounds", "validity"), [(5, "noisy"), (11, "valid")])
def test_few_disturbed_passes_among_many_are_borne_by_the_trimmed_mean(rounds, validity):
    machine = Machine()
    original = machine.table

    def table(*arguments):
        machine.cores = 1.0 if len(machine.rounds) == 0 else 0.0
        return original(*arguments)

    machine.table = table
    record, _ = confirmed(machine, "int8", rounds=rounds, passes=2)
    assert record["scenarios"]["qa"]["trials"]["int8"]["validity"] == validity


def test_trials_that_do_not_fit_together_are_measured_one_at_a_time():
    machine, plans = Machine(), []

    def apart(jobs, scenario, limits):
        plans.append(list(jobs))
        return machine.table(jobs, scenario, limits)

    record, _ = confirmed(machine, "int8", together=Together.never, one_at_a_time=apart, passes=5)
    assert plans == [["base", "int8"]] * 2
    qa = record["scenarios"]["qa"]
    assert (qa["together"], qa["apart"]) == (False, "the option `together` is never")
    assert [len(passes) for passes in qa["trials"]["base"]["rounds"]] == [1, 1]


def test_together_unless_memory_or_a_gpu_forbids_it():
    jobs = {trial: JOBS[trial] for trial in ("base", "int8")}
    gib = 2**30
    assert why_apart(jobs, Together.auto, {"base": gib, "int8": gib}, 3 * gib) is None
    assert why_apart(jobs, Together.auto, {"base": gib, "int8": None}, gib) is None
    reason = why_apart(jobs, Together.auto, {"base": 2 * gib, "int8": 2 * gib}, 3 * gib)
    assert reason == "together they need 4.0 GiB of memory, 3.0 GiB are allowed"
    assert why_apart(jobs, Together.always, {"base": 2 * gib, "int8": 2 * gib}, 3 * gib) is None
    on_gpu = {"base": replace(JOBS["base"], engine=FakeEngine(devices=["cuda:0"]))}
    assert why_apart(on_gpu, Together.auto, {}, gib) == "trials that share a GPU are measured one at a time"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"precision": 0.0}, "precision_percent must be between 0 and 100, got 0"),
        ({"budget_seconds": 0}, "time_budget_seconds must be above 0, got 0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, sentence):
    with pytest.raises(UserError, match=sentence):
        confirmed(Machine(), "int8", **options)


def test_trials_and_scenarios_that_do_not_exist_are_refused_by_name():
    with pytest.raises(UserError, match=r"finalists must name trials of this plan .*got 'int2'"):
        confirmed(Machine(), "int2")
    machine = Machine()
    bare = {trial: replace(job, scenarios={}) for trial, job in JOBS.items()}
    with pytest.raises(UserError, match="scenario must be one that trial base runs"):
        confirm(
            finalists("int8"), bare, rounds=2, passes=2, precision=0.1, budget_seconds=9, limits=LIMITS,
            runner=machine.run, side_by_side=machine.table,
        )  # fmt: skip


@pytest.mark.parametrize("together", [Together.always, Together.never])
def test_confirming_in_real_processes_finds_the_faster_one(tmp_path, together):
    scenario = Qa(
        prompt_tokens=8, output_tokens=8, requests=5, warmup=1, repetitions=1, patience_seconds=0, turn_requests=3
    )
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
    record, _ = confirm(
        finalists("int8"), jobs, rounds=2, passes=2, precision=0.9, budget_seconds=60, limits=LIMITS,
        together=together, runner=lambda job, limits: Outcome("ok"),
    )  # fmt: skip
    trials = record["scenarios"]["qa"]["trials"]
    fastest = {name: min(min(one) for passes in entry["rounds"] for one in passes) for name, entry in trials.items()}
    assert fastest["base"] > 2 * fastest["int8"]
