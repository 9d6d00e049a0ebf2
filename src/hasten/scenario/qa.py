"""Real-time question answering: one user, one request after another.

This is the SingleStream pattern of MLPerf Inference (https://arxiv.org/abs/1911.02549): the next
request is sent when the last one has been answered, so nothing is batched and latency is all that
counts. A prompt costs one pass over the weights for all its tokens at once (bound by arithmetic),
each generated token another pass for itself alone (bound by reading the weights from memory): TTFT
shows the first, TPOT the second, latency is what the user feels.

Lengths are fixed and the end-of-text token is ignored: no variant wins by answering short.

    python pipelines/evaluate.py name=int8@llamacpp variant=int8 engine=llamacpp scenario=[qa]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hasten.engine.base import Request, Session
from hasten.errors import UserError
from hasten.scenario.base import Figure, Report, Scenario
from hasten.scenario.prompts import PromptSource
from hasten.scenario.timing import Sample, timed


@dataclass
class Qa(Scenario):
    """prompt_tokens, output_tokens: the exact lengths of every request."""

    prompt_tokens: int = 128
    output_tokens: int = 64

    title: ClassVar[str] = "real-time QA"
    headline: ClassVar[str] = "latency_seconds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tokens < 1:
            raise UserError(f"prompt_tokens must be at least 1, got {self.prompt_tokens}")
        if self.output_tokens < 2:
            raise UserError(
                f"output_tokens must be at least 2 (the time per further token is measured), got {self.output_tokens}"
            )

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def measure(self, session: Session, prompts: PromptSource, seed: int, report: Report) -> list[Sample]:
        total = self.warmup + self.requests
        samples: list[Sample] = []
        for number, prompt in enumerate(prompts.draw(total, self.prompt_tokens, seed)):
            samples.append(timed(session, Request(number, prompt, self.output_tokens)))
            report(number + 1, total)
        return samples[self.warmup :]

    def figures(self, samples: Sequence[Sample]) -> dict[str, Figure]:
        ttft = tuple(sample.ttft_seconds for sample in samples)
        tpot = tuple(sample.tpot_seconds for sample in samples)
        latency = tuple(sample.latency_seconds for sample in samples)
        return {
            "ttft_seconds_p50": Figure(ttft),
            "tpot_seconds_p50": Figure(tpot),
            "latency_seconds_p50": Figure(latency),
            "latency_seconds_p90": Figure(latency, 90.0),
            "decode_tokens_per_second": Figure(tuple(1 / seconds for seconds in tpot)),
            "prefill_tokens_per_second": Figure(tuple(s.prompt_tokens / s.ttft_seconds for s in samples)),
        }
