"""What does hasten add to an engine's own time? A request as a trial reports it beside the library's own loop.

    python benchmarks/wrapping.py                            # llama.cpp, 110M parameters, half a minute
    python benchmarks/wrapping.py --shape 15m --format float32
    python -m pip install --target .work/genai --no-deps "openvino-genai==2026.4.1.*" "openvino-tokenizers==2026.4.1.*"
    PYTHONPATH=src:.work/genai python benchmarks/wrapping.py --engine openvino      # a minute
    PYTHONPATH=src:.work/genai python benchmarks/wrapping.py --engine openvino --attention SDPA --defaults

llama.cpp's server says of every request how long it took to read the prompt and to write each further token: the same
requests as hasten sees them. OpenVINO's package has no server, so its loop is OpenVINO GenAI's `LLMPipeline`, which
reads a GGUF of the same integers with its own graph: requests take turns with hasten's, in one process, with the
precisions that hasten's engine asks for (`--defaults`: those that GenAI takes by itself), and eight users at once with
its `ContinuousBatchingPipeline`. Prefixes are not cached, so that every prefill is one.

Printed is the median over requests of hasten's time over the library's, with the middle half: until the first token of
512, per token after it (128 after 16), and of eight users. Exits with 1 if decoding takes over 3% longer.

The other engines' loops are hasten's own (`native`) or run in its process token by token: there is no second clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from engines import PROMPT, SHAPES, USERS, Case, Load, made, prompt
from rich.console import Console

from hasten.artifacts import Variant
from hasten.engine.base import Dtype, Request, Session
from hasten.engine.llamacpp import LlamacppFlight
from hasten.errors import UserError
from hasten.hardware import cpu_count
from hasten.model.config import ModelConfig

REQUESTS, MOST, LOAD = 20, 0.03, Load()
FIRST, FURTHER, TOGETHER = "until the first token", "per further token", f"{USERS} users"


def listening() -> list[dict[str, Any]]:
    """What the server says of each request from now on."""
    heard: list[dict[str, Any]] = []
    plain = LlamacppFlight.receive

    def receive(self: LlamacppFlight, chunk: bytes) -> bool:
        answer = json.loads(chunk)
        if "timings" in answer:
            heard.append(answer["timings"])
        return plain(self, chunk)

    LlamacppFlight.receive = receive  # type: ignore[method-assign]
    return heard


def timed(session: Session, ids: tuple[int, ...], count: int) -> tuple[float, float]:
    """Hasten's seconds: until the first token, and per token after it (0 if there is none)."""
    tokens = list(session.submit(Request(0, ids, count)))
    return tokens[0].seconds, (tokens[-1].seconds - tokens[0].seconds) / max(count - 1, 1)


def beside_llamacpp(case: Case, config: ModelConfig, folder: Path) -> dict[str, list[float]]:
    """Hasten's seconds over the server's, by what was timed."""
    found: dict[str, list[float]] = {FIRST: [], FURTHER: []}
    heard, ids = listening(), prompt(LOAD.prefilled, config)
    with closing(case.options().load(Variant(folder / case.variant), folder / "engines")) as session:
        for _ in range(REQUESTS + 1):
            first, each = timed(session, ids, LOAD.decoded)
            theirs = heard[-1]
            found[FIRST].append(1000 * first / theirs["prompt_ms"])
            found[FURTHER].append(1000 * each / theirs["predicted_per_token_ms"])
    return {name: values[1:] for name, values in found.items()}  # the first request warms up


class Genai:
    """OpenVINO GenAI's own loops on a GGUF; token ids in and out."""

    def __init__(self, gguf: Path, attention: str, properties: dict[str, Any]) -> None:
        import openvino_genai

        tokenizer, plan = speechless(gguf.parent), openvino_genai.SchedulerConfig()
        plan.cache_size, plan.max_num_seqs, plan.max_num_batched_tokens = 1, USERS, 4096  # GiB, sequences, tokens
        plan.enable_prefix_caching = False
        planned = {"scheduler_config": plan} if attention == "PA" else {}
        own = {**properties, "ATTENTION_BACKEND": attention, **planned}
        self.alone = openvino_genai.LLMPipeline(gguf, tokenizer, "CPU", **own)
        self.shared = openvino_genai.ContinuousBatchingPipeline(str(gguf), tokenizer, plan, "CPU", **properties)

    def ids(self, prompt: tuple[int, ...]) -> Any:
        import openvino

        return openvino.Tensor(np.array([prompt], np.int64))

    def asked(self, count: int) -> Any:
        import openvino_genai

        return openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True)

    def first(self, ids: tuple[int, ...]) -> float:
        """Seconds until the first token."""
        start = time.perf_counter()
        self.alone.generate(self.ids(ids), self.asked(1))
        return time.perf_counter() - start

    def each(self, ids: tuple[int, ...], count: int) -> float:
        """Seconds per token after the first, as GenAI says itself."""
        answer = self.alone.generate(self.ids(ids), self.asked(count))
        assert len(answer.tokens[0]) == count
        return float(answer.perf_metrics.get_tpot().mean) / 1000

    def together(self, prompts: list[tuple[int, ...]], count: int) -> float:
        """Seconds until all are answered."""
        start = time.perf_counter()
        self.shared.generate([self.ids(one) for one in prompts], [self.asked(count)] * len(prompts))
        return time.perf_counter() - start


def speechless(folder: Path) -> Any:
    """A tokenizer, which GenAI will not do without; no text is ever read or written."""
    import openvino
    import openvino_genai
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({sign: id_ for id_, sign in enumerate([*signs, "ab"])}, [("a", "b")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    named = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=signs[0], eos_token=signs[1], pad_token=signs[2])
    for name, model in zip(("tokenizer", "detokenizer"), convert_tokenizer(named, with_detokenizer=True), strict=True):
        openvino.save_model(model, folder / f"openvino_{name}.xml")
    return openvino_genai.Tokenizer(str(folder))


def beside_genai(
    case: Case, config: ModelConfig, folder: Path, attention: str, defaults: bool
) -> dict[str, list[float]]:
    """Hasten's seconds over OpenVINO GenAI's, by what was timed."""
    from hasten.engine import gguf
    from hasten.engine.openvino import Openvino
    from hasten.engine.openvino.runtime import properties, runtime
    from hasten.model.grid import grid_of

    runtime()
    if lacking := [name for name in ("openvino_genai", "openvino_tokenizers") if not importlib.util.find_spec(name)]:
        raise UserError(f"--engine openvino needs {lacking[0]}: see the pip line in benchmarks/wrapping.py")
    variant, engine = Variant(folder / case.variant), case.options()
    assert isinstance(engine, Openvino)
    gguf.write(variant, Dtype.float16, folder / "model.gguf", text=False)
    asked = {"INFERENCE_NUM_THREADS": case.threads} if defaults else properties(engine, grid_of(variant))
    theirs = Genai(folder / "model.gguf", attention, asked)
    long, short = prompt(LOAD.prefilled, config), prompt(PROMPT, config)
    prompts = [prompt(PROMPT + number % 2, config) for number in range(USERS)]
    found: dict[str, list[float]] = {FIRST: [], FURTHER: [], TOGETHER: []}
    shared = Case(case.engine, case.format, case.threads, slots=USERS).options()
    with closing(engine.load(variant, folder)) as alone, closing(shared.load(variant, folder)) as many:
        for _ in range(REQUESTS + 1):
            found[FIRST].append(timed(alone, long, 1)[0] / theirs.first(long))
            found[FURTHER].append(timed(alone, short, LOAD.decoded)[1] / theirs.each(short, LOAD.decoded))
            streams = [many.submit(Request(number, one, LOAD.each)) for number, one in enumerate(prompts)]
            ours = max(list(stream)[-1].seconds for stream in streams)
            found[TOGETHER].append(ours / theirs.together(prompts, LOAD.each))
    return {name: values[1:] for name, values in found.items()}  # the first requests warm up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=("llamacpp", "openvino"), default="llamacpp")
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--format", default="int4")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument("--attention", choices=("PA", "SDPA"), default="PA", help="which of GenAI's graphs")
    parser.add_argument("--defaults", action="store_true", help="GenAI's own precisions instead of ours")
    options = parser.parse_args()
    console, config = Console(highlight=False, width=120), SHAPES[options.shape]
    case = Case(options.engine, options.format, options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made(options.shape, {case.variant}, folder)
        try:
            if options.engine == "openvino":
                found = beside_genai(case, config, folder, options.attention, options.defaults)
            else:
                found = beside_llamacpp(case, config, folder)
        except UserError as error:
            console.print(str(error))
            return 1
    for what, ratios in found.items():
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        console.print(f"{what}: {middle:.3f} of the library's own time [{low:.3f}, {high:.3f}]")
    return 0 if np.median(found[FURTHER]) - 1 <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
