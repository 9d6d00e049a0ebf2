"""Bits per byte: how well a variant still predicts held-out text, whatever its tokenizer.

Short answers hide damage: a variant may pick the right label and yet have lost its language. The
code length of text it has not seen shows that, continuously and at once for every language. Divided
by the text's UTF-8 bytes instead of by tokens it does not depend on how a tokenizer cuts the text
(Gao et al. 2020, arXiv:2101.00027, section 3.1):

    bits per byte = sum over tokens of -log2 p(token | the tokens before it) / bytes of their text

A document is `[bos] text [eos]`: the beginning is given, the text's tokens are each scored once, the
end is not scored (it spells no byte). A document longer than the model's context is read in windows
that overlap by half, so that a token sees at least half a context of text before it wherever the
document has that much. Weights are the variant's own, dequantised, in float32: this is about what
compression did to the model; what an engine's arithmetic adds is seen by `continuation`.

    python pipelines/compress.py plan=default name=int4 parent=variants/baseline compression=rtn compression.bits=4
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import SCHEMA, Checkpoint, Json, Tokens, read_json
from hasten.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from hasten.model.network import Network
    from hasten.tokenizer.base import Tokenizer
    from hasten.tokenizer.translating import Translation

LONGEST_WINDOW = 2048
"""Tokens per window at most, also for models meant for more: attention's cost grows with the square."""
TENSOR_VALUES = 2**20
"""Values in the largest tensors of a batch (4 MiB each): they stay in a core's cache."""
LEAST_ROWS = 64
"""Positions whose logits exist at the same time, also with a vocabulary for which that is more: the head is read anew
for each such group."""


@dataclass
class BitsPerByte:
    """max_tokens_per_language: whole documents of about that many tokens are scored; 0 means all held-out ones.

    Which ones is drawn once and for all, so every variant is scored on the same text. A document
    longer than the limit is left out, and counted as such.
    """

    max_tokens_per_language: int = 16384

    def __post_init__(self) -> None:
        if self.max_tokens_per_language < 0:
            raise UserError(
                f"bits_per_byte.max_tokens_per_language must be 0 (all) or more, got {self.max_tokens_per_language}"
            )


@dataclass(frozen=True)
class Score:
    """Bits per byte of one language's held-out text, with its 95% interval.

    n: documents scored. tokens, bytes: in them, tokens as the variant has them. left_out: documents that were drawn and
    not scored, because they exceed the limit or because their ids are not what the tokenizer makes of their text. why:
    the reason for what is None.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    tokens: int
    bytes: int
    left_out: int
    why: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """Documents of one language: `[bos] text` as ids, the UTF-8 bytes of each text, and how many were left out."""

    sequences: list[list[int]]
    bytes: list[int]
    too_long: int
    altered: int


def bits_per_byte(
    checkpoint: Checkpoint,
    tokens: Tokens,
    tokenizer: Tokenizer,
    *,
    max_tokens_per_language: int = 0,
    translation: Translation | None = None,
) -> dict[str, Score]:
    """The score of every language of the validation split.

    tokenizer: the one that made the tokens. translation: from it to the checkpoint's own, if that is another; the same
    documents are scored. Raises `UserError` if the tokens are not that tokenizer's, `RuntimeError` if a logit is not
    finite.
    """
    from hasten.model.huggingface import load_network

    texts = held_out(tokens, tokenizer, max_tokens_per_language)
    if translation is not None:
        texts = {name: replace(one, sequences=list(map(translation, one.sequences))) for name, one in texts.items()}
    model = load_network(checkpoint).eval()
    sequences = [ids for text in texts.values() for ids in text.sequences]
    if (largest := max((max(ids) for ids in sequences), default=0)) >= model.config.vocab_size:
        raise UserError(
            f"{tokens.path}: token ids must be below the vocabulary of {checkpoint.path} "
            f"({model.config.vocab_size}), got {largest}"
        )
    bits = token_bits(model, sequences)
    sums = iter([float(values.sum()) for values in bits])
    return {
        language: score(text, [next(sums) for _ in text.sequences], max_tokens_per_language)
        for language, text in texts.items()
    }


def held_out(tokens: Tokens, tokenizer: Tokenizer, max_tokens_per_language: int = 0) -> dict[str, HeldOut]:
    """Documents of the validation split by language, drawn in a fixed random order until the limit is reached."""
    import numpy as np

    ids, offsets, codes = (read("validation") for read in (tokens.ids, tokens.offsets, tokens.languages))
    found: dict[str, HeldOut] = {}
    for code, language in enumerate(tokens.manifest["languages"]):
        sequences: list[list[int]] = []
        sizes: list[int] = []
        too_long = altered = read_tokens = 0
        # Shuffled: documents lie source by source, and a limit must not keep the first source only.
        for document in np.random.default_rng(0).permutation(np.flatnonzero(codes == code)):
            sequence = ids[offsets[document] : offsets[document + 1]].tolist()
            if sequence[:1] != [tokenizer.bos_id] or sequence[-1] != tokenizer.eos_id:
                raise UserError(
                    f"{tokens.path}: document {document} of the validation split must begin with the tokenizer's "
                    f"bos ({tokenizer.bos_id}) and end with its eos ({tokenizer.eos_id}), got {sequence[:1]} and "
                    f"{sequence[-1:]}: the tokens were made with another tokenizer"
                )
            body = sequence[1:-1]
            if not body:
                continue
            if max_tokens_per_language and len(body) > max_tokens_per_language:
                too_long += 1
                continue
            content = tokenizer.decode(body)
            if tokenizer.encode(content) != body:  # an unknown token, for example: its bytes are not known
                altered += 1
                continue
            sequences.append(sequence[:-1])
            sizes.append(len(content.encode()))
            read_tokens += len(body)
            if max_tokens_per_language and read_tokens >= max_tokens_per_language:
                break
        found[language] = HeldOut(sequences, sizes, too_long, altered)
    return found


def windows(tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """How a sequence of `tokens` is read: (start, length, skip) for each window.

    Reading ids[start : start + length] predicts the id after each of them; the first `skip` of these predictions
    were made by an earlier window. Every id but the first is predicted exactly once, from at least context // 2
    ids before it where there are so many, and all windows but a lone one are full.
    """
    done = min(tokens - 1, context)
    yield 0, done, 0
    while done < tokens - 1:
        new = min(context - context // 2, tokens - 1 - done)
        done += new
        yield done - context, context, context - new


def token_bits(
    model: Network, sequences: Sequence[Sequence[int]], prompt_tokens: Sequence[int] | None = None
) -> list[np.ndarray]:
    """-log2 p of every token after the prompt, given all before it: (tokens - prompt,) float64 for each sequence.

    prompt_tokens: how many ids at the start of each sequence are its prompt, 1 by default; at least 1 and fewer than
    all. An encoder-decoder reads with its encoder the prompt, and in a later window what earlier ones have predicted.
    Raises `RuntimeError` if a logit is not finite.
    """
    import numpy as np
    import torch

    context = min(model.config.context, LONGEST_WINDOW)
    prompts = [1] * len(sequences) if prompt_tokens is None else list(prompt_tokens)
    work: list[Window] = []
    for row, (ids, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        for start, length, skip in windows(len(ids), context):
            if (skipped := max(skip, prompt - 1 - start)) < length:
                work.append(Window(row, start, length, skipped))
    work.sort(key=lambda window: -window.length)  # like lengths together, so that little is computed on padding
    batches: list[list[Window]] = []
    while work:
        count = max(1, TENSOR_VALUES // (model.config.widest * work[0].length))
        batches.append(work[:count])
        work = work[count:]
    found = [np.full(len(ids) - prompt, np.nan) for ids, prompt in zip(sequences, prompts, strict=True)]
    threads = torch.get_num_threads()
    # One thread per batch, not all threads on each operation: nothing waits, sums do not depend on how many there are.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for batch, values in zip(batches, pool.map(lambda b: _bits(model, sequences, b), batches), strict=True):
                for window in batch:
                    count = window.length - window.skip
                    first = window.start + window.skip + 1 - prompts[window.row]  # 0: the first after the prompt
                    found[window.row][first : first + count] = values[:count]
                    values = values[count:]
    finally:
        torch.set_num_threads(threads)
    if not all(np.isfinite(bits).all() for bits in found):
        raise RuntimeError("the logits are not finite")
    return found


@dataclass(frozen=True)
class Window:
    """One window (see `windows`) of the sequence in place `row`; `skip` may also hide what is left of the prompt."""

    row: int
    start: int
    length: int
    skip: int


def _bits(model: Network, sequences: Sequence[Sequence[int]], batch: Sequence[Window]) -> np.ndarray:
    """-log2 p of what each window is to predict, window after window, (predictions,) float64."""
    import torch
    import torch.nn.functional as F

    ids = torch.zeros(len(batch), batch[0].length, dtype=torch.int64)  # padded on the right: causal, so never looked at
    targets = torch.zeros_like(ids)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for i, window in enumerate(batch):
        part = torch.tensor(sequences[window.row][window.start : window.start + window.length + 1])
        ids[i, : window.length], targets[i, : window.length] = part[:-1], part[1:]
        wanted[i, window.skip : window.length] = True
    rows = max(LEAST_ROWS, TENSOR_VALUES // model.config.vocab_size)
    with torch.inference_mode():
        hidden = model.hidden(ids, torch.tensor([window.skip + 1 for window in batch]))
        states = hidden[wanted].split(rows)  # (n, hidden) each: the logits of a whole batch are too large
        parts = zip(states, targets[wanted].split(rows), strict=True)
        nats = torch.cat([F.cross_entropy(model.lm_head(x).float(), y, reduction="none") for x, y in parts])
    bits: np.ndarray = (nats.double() / math.log(2)).numpy()
    return bits


def score(text: HeldOut, bits: Sequence[float], limit: int = 0) -> Score:
    """Sum of bits by sum of bytes, with the interval that documents like these would give."""
    n, tokens, size = len(bits), sum(map(len, text.sequences)) - len(bits), sum(text.bytes)
    left_out = text.too_long + text.altered
    if not n:
        reasons = [
            f"{text.too_long} exceed max_tokens_per_language ({limit})" if text.too_long else "",
            f"{text.altered} hold ids that the tokenizer does not make of their text" if text.altered else "",
        ]
        why = f"no held-out document can be scored: {' and '.join(filter(None, reasons)) or 'there is none'}"
        return Score(None, None, None, 0, 0, 0, left_out, why)
    interval = ratio_interval(bits, text.bytes)
    low, high = interval or (None, None)
    unknown = None if interval else "an interval needs at least 2 documents, got 1"
    return Score(sum(bits) / size, low, high, n, tokens, size, left_out, unknown)


def ratio_interval(bits: Sequence[float], sizes: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of sum(bits) / sum(sizes) over documents, None for fewer than 2.

    The ratio is the mean of the documents' own ratios weighted by their size, and a few long documents often hold
    most of the bytes. Its variance is therefore the one robust to clusters and corrected for leverage (CR2), with the
    degrees of freedom that those weights leave (Bell and McCaffrey 2002, "Bias reduction in standard errors for linear
    regression with multi-stage samples"; Imbens and Kolesar 2016, doi:10.1162/REST_a_00552). Where lengths spread as
    those of real documents, it covers 93.8 to 98.6%; bootstrapping the documents 75 to 94% (measured:
    benchmarks/held_out_intervals.py).
    """
    import numpy as np
    from scipy.stats import t

    if len(bits) < 2:
        return None
    weights = np.asarray(sizes, np.float64) / sum(sizes)  # (documents,), the leverage of each
    rates = np.asarray(bits, np.float64) / np.asarray(sizes, np.float64)
    value = float(weights @ rates)
    spread = weights**2 / (1 - weights)
    error = math.sqrt(float(spread @ (rates - value) ** 2))
    # Satterthwaite: tr(M)^2 / tr(M^2) for M = G'G, M_ij = a_i a_j ([i = j] - w_i - w_j + s), a^2 = spread, s = sum w^2.
    s = float(weights @ weights)
    a, b, c = (float(spread @ weights**power) for power in (0, 1, 2))
    trace = float(spread @ (1 - 2 * weights + s))
    square = s * s * a * a - 4 * s * a * b + 2 * a * c + 2 * b * b + float(spread**2 @ (1 + 2 * s - 4 * weights))
    half = float(t.ppf(0.975, trace * trace / square)) * error
    return max(0.0, value - half), value + half


def byte_count(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """UTF-8 bytes that ids spell; special tokens spell none.

    Exact for a byte-level tokenizer, also where ids begin or end inside a character (each character of its entries
    stands for one byte); for any other, the bytes of the decoded text.
    """
    from tokenizers.decoders import ByteLevel

    if not isinstance(tokenizer.backend.decoder, ByteLevel):
        return len(tokenizer.decode(ids).encode())
    added = tokenizer.backend.get_added_tokens_decoder()
    total = 0
    for id_ in ids:
        if id_ in added:
            total += 0 if added[id_].special else len(added[id_].content.encode())
        else:
            total += len(tokenizer.backend.id_to_token(id_) or "")
    return total


def attempt(checkpoint: Checkpoint, tokens: Path, tokenizer: Path, options: BitsPerByte) -> Json:
    """What `artifacts/<plan>/bits_per_byte/<variant>.json` holds: {schema, variant, options, languages, why}.

    languages: {language: {value, ci95, n, tokens, bytes, left_out}}, n being documents; null is explained in `why`.
    Never raises. The variant is on disk and sound by then; one that cannot be scored (its logits overflow, say) must
    still be evaluated, where the same damage shows as a failed trial, instead of ending the pipeline here.
    """
    from hasten.tokenizer.base import load_tokenizer
    from hasten.tokenizer.translating import translation

    found: Json = {"schema": SCHEMA, "variant": checkpoint.path.name, "options": asdict(options)}
    try:
        scores = bits_per_byte(
            checkpoint,
            Tokens(tokens),
            load_tokenizer(tokenizer),
            max_tokens_per_language=options.max_tokens_per_language,
            translation=translation(tokenizer, checkpoint.path),
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        why = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
        sys.stderr.write(f"bits per byte of {checkpoint.path.name} could not be measured: {why}\n")
        return found | {"languages": {}, "why": {"bits_per_byte": why}}
    languages = {
        language: {
            "value": _rounded(one.value),
            "ci95": None if one.low is None else [_rounded(one.low), _rounded(one.high)],
            **{name: getattr(one, name) for name in ("n", "tokens", "bytes", "left_out")},
        }
        for language, one in scores.items()
    }
    reasons = {f"bits_per_byte.{language}": one.why for language, one in scores.items() if one.why}
    return found | {"languages": languages, "why": reasons}


def _rounded(value: float | None) -> float | None:
    """Without the digits in which two runs of the same sums on several threads may differ."""
    return None if value is None else round(value, 6)


def metrics(found: Json) -> dict[str, float | None]:
    """By flat names, for the table of runs: `bits_per_byte_en`, `bits_per_byte_en_low`, `bits_per_byte_en_high`."""
    flat: dict[str, float | None] = {}
    for language, entry in found["languages"].items():
        name, (low, high) = f"bits_per_byte_{language}", entry["ci95"] or (None, None)
        flat |= {name: entry["value"], f"{name}_low": low, f"{name}_high": high}
    return flat


def recorded_bits_per_byte(path: Path) -> Json:
    """What `attempt` said of a variant, from its file; without one no languages, and why."""
    if path.is_file():
        return read_json(path)
    return {"languages": {}, "why": {"bits_per_byte": f"{path} does not exist"}}
