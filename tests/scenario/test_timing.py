from collections.abc import Iterator

import pytest

from hasten.engine.base import Request, Token
from hasten.scenario.timing import Sample, check_clock, timed
from tests.fakes import FakeSession

REQUEST = Request(4, (5, 6, 7), max_tokens=3)


class Stamped(FakeSession):
    """Gives the tokens it is told to, at once, with the stamps it is told to claim."""

    def __init__(self, stamps: list[float], request: int = 4) -> None:
        super().__init__()
        self.tokens = [Token(request, 9, seconds) for seconds in stamps]

    def submit(self, request: Request) -> Iterator[Token]:
        yield from self.tokens


def test_a_request_is_timed_by_its_tokens():
    sample = timed(FakeSession(token_seconds=0.01), REQUEST)
    assert (sample.prompt_tokens, sample.output_tokens) == (3, 3)
    assert 0.01 <= sample.ttft_seconds < sample.latency_seconds <= sample.client_seconds
    assert sample.tpot_seconds == pytest.approx((sample.latency_seconds - sample.ttft_seconds) / 2)
    assert sample.latency_seconds >= 0.03


def test_what_an_engine_guessed_for_a_request_is_its_own_alone():
    assert timed(FakeSession(token_seconds=1e-3), REQUEST).guessed is None

    class Guessing(FakeSession):
        """Has guessed 10 tokens before, 6 of them right, and two for every request, one of them right."""

        def guessed(self) -> tuple[int, int]:
            asked = len(self.requests)
            return 10 + 2 * asked, 6 + asked

    session = Guessing(token_seconds=1e-3)
    samples = [timed(session, REQUEST) for _ in range(2)]
    assert [(sample.guessed, sample.accepted) for sample in samples] == [(2, 1), (2, 1)]


@pytest.mark.parametrize(
    ("stamps", "request_id", "complaint"),
    [
        ([1e-6, 2e-6], 4, "gave 2 tokens where exactly 3"),
        ([1e-6, 2e-6, 3e-6, 4e-6], 4, "gave more tokens where exactly 3"),
        ([], 4, "gave 0 tokens"),
        ([3e-6, 2e-6, 4e-6], 4, "run backwards"),
        ([-1e-6, 2e-6, 4e-6], 4, "before the request was sent"),
        ([1e-6, 1e-6, 1e-6], 4, "all tokens at once"),
        ([1.0, 2.0, 3.0], 4, "later than it was received"),
        ([1e-6, 2e-6, 3e-6], 5, "answered request 5"),
    ],
)
def test_stamps_that_cannot_be_are_refused(stamps, request_id, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        timed(Stamped(stamps, request_id), REQUEST)


def sample(latency: float, client: float) -> Sample:
    return Sample(latency / 2, latency / 4, latency, 3, 3, client)


def test_an_engine_that_leaves_out_part_of_the_wait_is_found_out():
    with pytest.raises(RuntimeError, match=r"leave out 0\.1000 s"):
        check_clock([sample(0.1, 0.2)] * 5)


def test_one_late_reader_does_not_condemn_an_engine():
    check_clock([sample(0.1, 0.101)] * 4 + [sample(0.1, 0.5)])
