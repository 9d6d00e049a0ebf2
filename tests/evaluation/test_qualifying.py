import pytest

from hasten.errors import UserError
from hasten.evaluation.limits import Limits
from hasten.evaluation.qualifying import Qualified, qualify, taking_part
from hasten.evaluation.trial import Outcome
from tests.evaluation.test_confirmation import JOBS, Machine

LIMITS = Limits(60.0)


@pytest.mark.parametrize(
    ("speeds", "baselines", "most", "expected"),
    [
        ({"f32": 1.0, "f16": 1.3, "int4": 2.0, "slow": 0.6}, ["f32", "f16"], 6, ["int4", "f16", "f32"]),
        ({"f32": 1.0, "int8": 0.7}, ["f32"], 6, ["f32", "int8"]),  # it may have been measured in a bad minute
        ({"f32": 1.0, "int8": 0.4}, ["f32"], 6, []),  # no rival is left
        ({"f32": 1.0, "f16": 0.9, "a": 3.0, "b": 2.5, "c": 2.0}, ["f32", "f16"], 3, ["a", "b", "f32"]),
        ({"f32": 1.0, "f16": 0.9, "a": 3.0}, ["f32", "f16"], 6, ["a", "f32", "f16"]),
        ({"f32": 1.0, "f16": 0.4, "a": 3.0}, ["f32", "f16"], 6, ["a", "f32"]),
        ({"a": 3.0}, [], 6, []),
        ({"f32": 1.0, "f16": 0.9}, ["f32", "f16"], 6, ["f32", "f16"]),
    ],
)
def test_those_who_may_be_ahead_take_part(speeds, baselines, most, expected):
    assert taking_part(speeds, baselines, most) == expected


def round_of(machine: Machine, *trials: str, peaks=None, limits=LIMITS, passes=3, budget_seconds=99.0) -> Qualified:
    jobs = {trial: JOBS[trial] for trial in trials}
    return qualify(
        jobs, "qa", passes=passes, budget_seconds=budget_seconds, limits=limits, peaks=peaks or {},
        table_plan=machine.table, clock=machine.clock,
    )  # fmt: skip


def test_beside_a_busy_process_it_ends_in_time_with_the_passes_it_has():
    machine = Machine(seconds=10.0)  # 40 s for each pass
    found = round_of(machine, "base", "int8", passes=100, budget_seconds=50.0)
    assert len(machine.turns) == 2 * 4
    assert found.speeds["int8"] > 1.8
    with pytest.raises(UserError, match="time_budget_seconds must be above 0, got 0"):
        round_of(machine, "base", "int8", budget_seconds=0)


def test_the_ratios_come_from_turns_side_by_side():
    machine = Machine()
    found = round_of(machine, "base", "int8", "int4")
    assert found.why is None and found.failed == {}
    assert machine.rounds == [["base", "int8", "int4"]]
    assert len(machine.turns) == 3 * 6
    speeds = found.speeds
    assert speeds["int8"] / speeds["base"] == pytest.approx(2, rel=0.02)  # the played machine drifts by 18% meanwhile
    assert speeds["int4"] / speeds["base"] == pytest.approx(4, rel=0.02)


def test_who_fails_is_named_and_the_others_go_on():
    found = round_of(Machine(fails={"int4": 2}), "base", "int8", "int4")
    assert found.failed == {"int4": "failed: it crashed"}
    assert set(found.speeds) == {"base", "int8"}


def test_who_is_left_alone_has_nobody_to_be_compared_with():
    found = round_of(Machine(fails={"base": 1}), "base", "int8")
    assert (found.speeds, found.why) == ({}, "fewer than two of them ran")


def test_no_round_where_they_do_not_fit_into_memory():
    machine = Machine()
    found = round_of(machine, "base", "int8", peaks={"base": 9, "int8": 9}, limits=Limits(60.0, 10))
    assert found.speeds == {} and "together they need" in str(found.why)
    assert machine.rounds == []


def test_a_failure_does_not_raise_and_says_which_state_it_was():
    machine = Machine()
    original = machine.table

    def table(*arguments):
        made = original(*arguments)
        made.failed["int8"] = Outcome("refused", "no such format")
        return made

    machine.table = table
    assert round_of(machine, "base", "int8", "int4").failed == {"int8": "refused: no such format"}
