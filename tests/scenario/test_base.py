from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hasten.scenario.base import part_seed
from hasten.scenario.qa import Qa


@given(requests=st.integers(1, 200), repetitions=st.integers(1, 20), warmup=st.integers(0, 5))
def test_parts_divide_the_requests_evenly_and_warm_up_once(requests, repetitions, warmup):
    scenario = Qa(requests=requests, repetitions=repetitions, warmup=warmup, prompt_tokens=77)
    parts = scenario.parts()
    sizes = [part.requests for part in parts]
    assert sum(sizes) == requests
    assert len(parts) == min(repetitions, requests)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert [part.warmup for part in parts] == [warmup] + [0] * (len(parts) - 1)
    for part in parts:
        assert replace(part, requests=requests, warmup=warmup, repetitions=repetitions) == scenario
        assert part.parts() == [part]


def test_one_repetition_is_the_scenario_itself():
    assert Qa(repetitions=1).parts() == [Qa(repetitions=1)]


def test_a_turn_is_the_same_load_but_short():
    scenario = Qa(requests=40, warmup=3, turn_requests=2, turn_warmup=0, prompt_tokens=77)
    turn = scenario.turn()
    assert (turn.requests, turn.warmup) == (2, 0)
    assert (turn.prompt_tokens, turn.output_tokens) == (77, scenario.output_tokens)
    assert turn.turn() == turn
    assert turn.parts() == [turn]


def test_every_part_of_every_seed_has_prompts_of_its_own():
    seeds = {part_seed(seed, part) for seed in range(100) for part in range(20)}
    assert len(seeds) == 2000
    assert part_seed(7, 0) == 7
