from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hasten.errors import UserError
from hasten.scenario.prompts import PromptSource
from hasten.scenario.qa import Qa
from hasten.scenario.timing import Sample
from tests.fakes import FakeSession, write_tokens

CONF = Path(__file__).parents[2] / "conf" / "scenario" / "qa.yaml"


@pytest.mark.parametrize(
    "option",
    [
        {"prompt_tokens": 0},
        {"output_tokens": 1},
        {"requests": 0},
        {"warmup": -1},
        {"minimum_requests": 0},
        {"patience_seconds": -1},
        {"repetitions": 0},
        {"turn_requests": 0},
        {"turn_warmup": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(option):
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=rf"{name} must be at least .*got {value}"):
        Qa(**option)


def test_requests_follow_one_another_at_fixed_lengths_and_warm_up_is_not_counted(tmp_path):
    session = FakeSession(token_seconds=0.0001)
    seen: list[tuple[int, int]] = []
    scenario = Qa(prompt_tokens=12, output_tokens=4, requests=5, warmup=2)
    prompts = PromptSource(write_tokens(tmp_path, list(range(3, 45))))
    samples = scenario.measure(session, prompts, 0, lambda done, total: seen.append((done, total)))
    assert [(s.prompt_tokens, s.output_tokens) for s in samples] == [(12, 4)] * 5
    assert len(session.requests) == 7
    assert all(not r.stop and r.max_tokens == 4 and len(r.prompt) == 12 for r in session.requests)
    assert seen == [(i, 7) for i in range(1, 8)]


def test_the_same_seed_asks_every_engine_the_same(tmp_path):
    scenario = Qa(prompt_tokens=8, output_tokens=2, requests=3, warmup=0)
    prompts = PromptSource(write_tokens(tmp_path, list(range(3, 45))))
    asked = []
    for _ in range(2):
        session = FakeSession(token_seconds=0.0001)
        scenario.measure(session, prompts, 3, lambda done, total: None)
        asked.append([request.prompt for request in session.requests])
    assert asked[0] == asked[1]


def test_figures_are_what_their_names_say():
    samples = [Sample(0.1, 0.02, 0.5, 128, 21, 0.5), Sample(0.2, 0.04, 1.0, 128, 21, 1.0)]
    figures = Qa().figures(samples)
    assert figures["ttft_seconds_p50"].values == (0.1, 0.2)
    assert figures["tpot_seconds_p50"].values == (0.02, 0.04)
    assert figures["latency_seconds_p90"].values == (0.5, 1.0)
    assert figures["latency_seconds_p90"].percentile == 90
    assert figures["decode_tokens_per_second"].values == pytest.approx((50, 25))
    assert figures["prefill_tokens_per_second"].values == pytest.approx((1280, 640))
    assert Qa().headline_values(samples) == [0.5, 1.0]
    assert Qa().headline_figure in figures


def test_the_yaml_spells_out_every_option_with_its_default():
    values = yaml.safe_load(CONF.read_text())
    assert values.pop("defaults") == ["base_qa@_here_", "_self_"]
    assert values == {f.name: f.default for f in fields(Qa)}


def test_the_context_holds_prompt_and_completion():
    assert Qa(prompt_tokens=100, output_tokens=20).context_tokens == 120
