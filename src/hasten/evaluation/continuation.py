"""Continuation: what long greedy decoding through the timed engine has become.

A short answer ends before errors can feed on themselves; 128 tokens do not. Every trial continues the
same slices of held-out text, greedily, end of text ignored, and its output is held against the float
baseline (the plan's tuned checkpoint, in float32 by our own decoder):

    bits per byte            of the output given its prompt, under the baseline: does it still find this likely?
    repetition rate          1 - distinct 4-grams / 4-grams of an output, seq-rep-4 of Welleck et al. 2020
                             (arXiv:1908.04319): greedy decoding of a damaged model falls into loops
    tokens until divergence  from the baseline's own greedy output: the first place where they differ

They are read together, and beside the baseline's own figures: a loop is *likely* text (Holtzman et al.
2020, arXiv:1904.09751), so few bits and much repetition is damage, and an output that left the
baseline's early may be as good. The texts are kept side by side in `continuations/T.parquet`. A variant with a
tokenizer of its own is asked the same text, and what it says is judged as ids of the plan's tokenizer.

    python pipelines/evaluate.py plan=default name=int4-llamacpp variant=int4 engine=llamacpp
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.artifacts import Json, Tokens, replacing
from hasten.engine.base import Request, Session
from hasten.errors import UserError
from hasten.evaluation.statistics import Unknown, percentile

if TYPE_CHECKING:
    import torch

    from hasten.evaluation.trial import Job
    from hasten.model.network import Network
    from hasten.tokenizer.base import Tokenizer

GRAM = 4
"""Tokens in a row that count as repeated."""
SMALL_MODEL = 30_000_000
"""Parameters below which one thread generates: a step is then too short to share. Measured on 2 cores with 5M: 1.1 s
for 16 x 128 tokens by one thread or two, but 19 to 42 s by two, waiting for each other, while others compute."""

Row = dict[str, Any]


@dataclass
class Continuation:
    """prompts_per_language: slices of held-out documents that are continued; 0 means none.

    prompt_tokens: tokens of each (fewer where no document of a language is that long).
    output_tokens: tokens generated for each.
    """

    prompts_per_language: int = 4
    prompt_tokens: int = 64
    output_tokens: int = 128

    def __post_init__(self) -> None:
        for field, least in (("prompts_per_language", 0), ("prompt_tokens", 1), ("output_tokens", GRAM)):
            if getattr(self, field) < least:
                raise UserError(f"continuation.{field} must be at least {least}, got {getattr(self, field)}")

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and output together."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class Prompt:
    """A slice of a held-out document. id: its language, document and first token."""

    id: str
    language: str
    tokens: tuple[int, ...]


def prompts(tokens: Tokens, options: Continuation, seed: int) -> list[Prompt]:
    """Slices of the validation split by language, the same for every trial with the same seed.

    Each of another document while there are documents of that length; never the bos and eos around a document.
    Raises `UserError` if the split has no text.
    """
    import numpy as np

    ids, offsets, codes = (read("validation") for read in (tokens.ids, tokens.offsets, tokens.languages))
    lengths = np.diff(offsets) - 2
    found: list[Prompt] = []
    for code, language in enumerate(tokens.manifest["languages"]):
        documents = np.flatnonzero((codes == code) & (lengths > 0))
        if len(documents) == 0:
            continue
        length = min(options.prompt_tokens, int(lengths[documents].max()))
        generator = np.random.default_rng((seed, code))
        order = generator.permutation(documents[lengths[documents] >= length])
        for i in range(options.prompts_per_language):
            document = int(order[i % len(order)])
            start = int(generator.integers(0, lengths[document] - length + 1)) + 1
            first = int(offsets[document]) + start
            slice_ = tuple(ids[first : first + length].tolist())
            found.append(Prompt(f"{language}-{i}-document{document}-token{start}", language, slice_))
    if not found and options.prompts_per_language:
        raise UserError(f"{tokens.path}: the validation split must hold at least one document to continue, got none")
    return found


def generate(session: Session, job: Job, report: Callable[[int, int], None] = lambda done, total: None) -> list[Row]:
    """The outputs of the job's prompts through `session`: language, prompt_id, prompt_ids and output_ids of each, in
    ids of the plan's tokenizer.

    Needs no torch. No options or 0 prompts give no rows. Raises `UserError` if a prompt and its output do not fit the
    engine's context or the job names no baseline, `RuntimeError` if the engine breaks the rules or logits overflow.
    """
    from hasten.artifacts import load_checkpoint
    from hasten.evaluation.quality import completions
    from hasten.tokenizer.translating import translation

    options = job.continuation
    if options is None or not options.prompts_per_language:
        return []
    if job.baseline is None:
        raise UserError("continuation needs the float baseline that outputs are held against, got none")
    if options.context_tokens > job.engine.max_context:
        raise UserError(
            f"continuation.prompt_tokens and output_tokens must fit max_context of engine {job.engine.name} "
            f"({job.engine.max_context}), got {options.prompt_tokens} + {options.output_tokens}"
        )
    drawn = prompts(Tokens(job.tokens), options, job.seed)
    own = translation(job.tokenizer, job.variant)
    asked = [prompt.tokens for prompt in drawn]
    if own is not None:  # what takes more tokens loses its beginning, what was half a character is empty
        cut = [own(ids, cut=True)[-options.prompt_tokens :] for ids in asked]
        asked = [tuple(ids) or (own.target.bos_id,) for ids in cut]
    requests = [Request(i, ids, options.output_tokens, verify=True) for i, ids in enumerate(asked)]
    vocabulary = int(load_checkpoint(job.baseline if own is None else job.variant).config["vocab_size"])
    outputs = completions(session, requests, vocabulary, report)
    if own is not None:
        outputs = [own.back(ids, cut=True) for ids in outputs]
    return [
        {"language": one.language, "prompt_id": one.id, "prompt_ids": list(one.tokens), "output_ids": output}
        for one, output in zip(drawn, outputs, strict=True)
    ]


def judge(rows: Sequence[Row], baseline: Path, tokenizer: Path) -> list[Row]:
    """Hold each output against the float baseline (a checkpoint): the columns of `continuations/T.parquet`.

    `bits` are the output's given its prompt under the baseline, `bytes` those that it spells; `reference` is the
    baseline's own greedy output with its figures. Raises `RuntimeError` if the baseline's logits are not finite.
    """
    if not rows:
        return []
    from hasten.artifacts import load_checkpoint
    from hasten.model.huggingface import load_network
    from hasten.tokenizer.base import load_tokenizer

    model, words = load_network(load_checkpoint(baseline)).eval(), load_tokenizer(tokenizer)
    asked, outputs = [row["prompt_ids"] for row in rows], [row["output_ids"] for row in rows]
    longest = greedy(model, asked, max(map(len, outputs)))
    references = [ids[: len(output)] for ids, output in zip(longest, outputs, strict=True)]
    own, theirs = spelled(asked, outputs, model, words), spelled(asked, references, model, words)
    found: list[Row] = []
    for i, (row, output, reference) in enumerate(zip(rows, outputs, references, strict=True)):
        same = divergence(output, reference)
        found.append(
            {
                "language": row["language"],
                "prompt_id": row["prompt_id"],
                "prompt": words.decode(asked[i]),
                "output": words.decode(output),
                "output_ids": output,
                "bits": own[i][0],
                "bytes": own[i][1],
                "repetition_rate": repetition_rate(output),
                "tokens_until_divergence": same,
                "diverged": same < len(output),
                "reference": words.decode(reference),
                "reference_bits": theirs[i][0],
                "reference_bytes": theirs[i][1],
                "reference_repetition_rate": repetition_rate(reference),
            }
        )
    return found


def greedy(model: Network, sequences: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Exactly `tokens` greedy tokens after each sequence; those of equal length run as one batch with a state.

    Raises `RuntimeError` if a logit that decides is not finite.
    """
    import torch

    from hasten.model.cost import cost_of

    found: list[list[int]] = [[] for _ in sequences]
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if cost_of(model.config).parameters < SMALL_MODEL else threads)
    for length in sorted({len(ids) for ids in sequences}):
        rows = [row for row, ids in enumerate(sequences) if len(ids) == length]
        cache = model.new_state(len(rows), length + tokens, torch.float32)
        ids: torch.Tensor = torch.tensor([list(sequences[row]) for row in rows])  # (B, length)
        for _ in range(tokens):
            with torch.inference_mode():
                best, ids = model(ids, cache)[:, -1].max(dim=-1, keepdim=True)  # (B, 1)
            if not torch.isfinite(best).all():
                raise RuntimeError("the baseline's logits are not finite")
            for row, id_ in zip(rows, ids[:, 0].tolist(), strict=True):
                found[row].append(id_)
    torch.set_num_threads(threads)
    return found


def spelled(
    asked: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], baseline: Network, tokenizer: Tokenizer
) -> list[tuple[float, int]]:
    """(bits under the baseline given the prompt, bytes) of each output. An encoder-decoder reads the prompt as one."""
    from hasten.evaluation.bits_per_byte import byte_count, token_bits

    texts = [[*prompt, *ids] for prompt, ids in zip(asked, outputs, strict=True)]
    bits = token_bits(baseline, texts, [len(prompt) for prompt in asked])
    return [(float(own.sum()), byte_count(tokenizer, ids)) for own, ids in zip(bits, outputs, strict=True)]


def repetition_rate(ids: Sequence[int]) -> float:
    """seq-rep-4: the share of 4-grams that occurred before in the sequence; 0 if it has none."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def divergence(ids: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens two sequences of equal length have in common before they first differ."""
    return next((i for i, (a, b) in enumerate(zip(ids, reference, strict=True)) if a != b), len(ids))


def summary(rows: Sequence[Row]) -> Json | None:
    """The `continuation` of a measurement: figures over all prompts, per language, and the baseline's own.

    None without rows. Bits per byte are sums over sums, repetition is the mean over prompts, divergence the median
    with its interval; a prompt that never diverges counts as its whole length.
    """
    if not rows:
        return None
    languages = sorted({row["language"] for row in rows})
    return {
        **_figures(rows),
        "output_tokens": max(len(row["output_ids"]) for row in rows),
        "languages": {name: _figures([row for row in rows if row["language"] == name]) for name in languages},
    }


def _figures(rows: Sequence[Row]) -> Json:
    median = percentile([float(row["tokens_until_divergence"]) for row in rows], 50)
    known = None if isinstance(median, Unknown) else median
    why = {"tokens_until_divergence_p50": median.why} if isinstance(median, Unknown) else {}
    own, theirs = _scores(rows, ""), _scores(rows, "reference_")
    for where, scores in (("", own), ("reference.", theirs)):
        if scores["bits_per_byte"] is None:
            why[f"{where}bits_per_byte"] = "the outputs spell no byte"
    return {
        "n": len(rows),
        **own,
        "tokens_until_divergence_p50": known.value if known else None,
        "ci95": {"tokens_until_divergence_p50": known.ci95 if known else None},
        "diverged_share": sum(row["diverged"] for row in rows) / len(rows),
        "reference": theirs,
        "why": why,
    }


def _scores(rows: Sequence[Row], whose: str) -> Json:
    bits, size, rate = (sum(row[f"{whose}{name}"] for row in rows) for name in ("bits", "bytes", "repetition_rate"))
    return {"bits_per_byte": bits / size if size else None, "repetition_rate": rate / len(rows)}


def save(rows: Sequence[Row], path: Path) -> None:
    """Write continuations atomically as parquet; no rows give an empty table with the same columns."""
    import pyarrow as pa
    from pyarrow import parquet

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    kinds = {
        **dict.fromkeys(("language", "prompt_id", "prompt", "output"), text),
        "output_ids": pa.list_(whole),
        "bits": real,
        "bytes": whole,
        "repetition_rate": real,
        "tokens_until_divergence": whole,
        "diverged": pa.bool_(),
        "reference": text,
        "reference_bits": real,
        "reference_bytes": whole,
        "reference_repetition_rate": real,
    }
    with replacing(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(list(rows), pa.schema(list(kinds.items()))), temporary)
