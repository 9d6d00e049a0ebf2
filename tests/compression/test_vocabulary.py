from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Checkpoint, Tokens, Variant, read_json, write_json
from hasten.compression.depth import Depth
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.calibration import Calibrate, counted, draw
from hasten.compression.vocabulary import Vocabulary
from hasten.engine.base import Request
from hasten.engine.eager import Eager
from hasten.engine.gguf_vocabulary import read_vocabulary
from hasten.errors import UserError
from hasten.evaluation import bits_per_byte as scoring
from hasten.evaluation.bits_per_byte import BitsPerByte
from hasten.evaluation.continuation import Continuation, judge
from hasten.evaluation.trial import Job
from hasten.evaluation.worker import measure
from hasten.model.huggingface import load_network
from hasten.scenario.qa import Qa
from hasten.task.data import TaskData
from hasten.tokenizer.base import load_tokenizer
from hasten.tokenizer.translating import translation
from tests.compression.plans import ITEMS, write_plan
from tests.engine import llama
from tests.engine.engines import ENGINES, opened
from tests.tiny import lstm, write_checkpoint, write_variant

EXACT: dict[str, Any] = {"threads": 1, "max_context": 256}


class Study:
    """A plan, its baseline, and a variant with the tokens that the plan uses."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.parent = llama.variant(folder / "variants" / "baseline", llama.shape(context=1024))
        named = self.parent.path / "tokenizer_config.json"
        write_json(named, {**read_json(named), "tokenizer_class": "PreTrainedTokenizerFast"})
        self.plan = write_plan(folder, self.parent)
        self.counts = counted(self.plan, self.parent)
        self.method = Vocabulary(**{"multiple_of": 1, "least_count": 2, **options})
        self.made, self.cost = make_variant(
            self.method, self.parent, self.counts, name="small", target=folder / "variants" / "small", seed=0
        )
        old, new = (load_tokenizer(one.path).backend for one in (self.parent, self.made))
        ids = {id_: old.token_to_id(text) for text, id_ in new.get_vocab().items()}
        self.kept = [ids[id_] for id_ in range(len(ids))]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study") / "plan")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Little more than bytes: all text takes more tokens."""
    return Study(tmp_path_factory.mktemp("smallest") / "plan", keep=264)


def test_counts_are_of_all_text_and_of_all_training_items(study: Study) -> None:
    tokenizer = load_tokenizer(study.plan / "tokenizer")
    ids = study.plan / "tokens"
    expected = torch.zeros(llama.VOCABULARY, dtype=torch.int64)
    for id_ in Tokens(ids).ids("train").tolist():
        expected[id_] += 1
    for item in ITEMS:
        for id_ in (*tokenizer.prompt_ids(item.prompt), *tokenizer.completion_ids(item.expected)):
            expected[id_] += 1
    assert study.counts.counts is not None
    assert torch.equal(study.counts.counts, expected)
    assert study.counts.tokens == expected.sum() == study.cost["build_tokens"]
    assert study.made.manifest["calibration"] == study.counts.source


def test_tokens_that_are_used_stay_and_others_go(study: Study) -> None:
    assert study.counts.counts is not None
    assert study.kept == sorted(study.kept)
    assert len(study.kept) < 300
    frequent = {id_ for id_, count in enumerate(study.counts.counts.tolist()) if count >= 2}
    assert frequent <= set(study.kept)
    assert {0, 1, 2} <= set(study.kept)
    notes = study.made.manifest["notes"]
    assert notes["kept"] == len(study.kept) == study.made.config["vocab_size"]
    assert notes["of"] == llama.VOCABULARY
    assert notes["used"] == int((study.counts.counts > 0).sum())
    assert notes["text_growth"] == pytest.approx(1, abs=0.05)


def test_a_number_of_tokens_is_met_with_the_most_frequent(tmp_path: Path, study: Study) -> None:
    made = Vocabulary(keep=259, multiple_of=16).compress(study.parent, study.counts, 0)
    assert made.config["vocab_size"] == 272
    assert made.tensors["model.embed_tokens.weight"].shape[0] == 272
    assert made.notes["text_growth"] > 1
    content = made.files["tokenizer.json"]
    assert content is not None
    assert len(content["model"]["vocab"]) == 272


def test_growth_is_how_many_more_tokens_the_dropped_ones_become(smallest: Study) -> None:
    old, new = (load_tokenizer(one.path) for one in (smallest.parent, smallest.made))
    counts = smallest.counts.counts
    assert counts is not None
    total = 0
    for id_, count in enumerate(counts.tolist()):
        text = old.backend.id_to_token(id_)
        if count and id_ not in smallest.kept:
            # of ASCII tokens the text is known without its neighbours
            word = text.replace("Ġ", " ")
            pieces = len(new.encode(word)) if word.isascii() else len(smallest_pieces(text, smallest))
            total += count * (pieces - 1)
    assert smallest.made.manifest["notes"]["text_growth"] == pytest.approx(1 + total / int(counts.sum()), abs=1e-6)
    assert total > 0


def smallest_pieces(text: str, study: Study) -> list[str]:
    """A byte-level token's own characters, joined by hand with what merges are left."""
    content = json.loads((study.made.path / "tokenizer.json").read_text())["model"]
    pieces = list(text)
    for left, right in (one if isinstance(one, list) else one.split(" ") for one in content["merges"]):
        place = 0
        while place < len(pieces) - 1:
            if pieces[place : place + 2] == [left, right]:
                pieces[place : place + 2] = [left + right]
            place += 1
    return pieces


def test_dropping_tokens_changes_no_logit_of_those_that_stay(study: Study) -> None:
    before, after = (load_network(one).eval() for one in (study.parent, study.made))
    places = torch.randint(0, len(study.kept), (3, 40), generator=torch.Generator().manual_seed(0))
    kept = torch.tensor(study.kept)
    with torch.inference_mode():
        torch.testing.assert_close(after(places), before(kept[places])[:, :, kept], rtol=0, atol=1e-5)


def greedy(variant: Checkpoint, prompt: tuple[int, ...], tokens: int) -> list[int]:
    model, ids = load_network(variant).eval(), list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def integers(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    target = tmp_path_factory.mktemp("integers") / "child"
    child, _ = make_variant(Rtn(bits=4), study.made, None, name="small-int4", target=target, seed=0)
    assert child.lineage == ["baseline", "small", "small-int4"]
    return child


@pytest.mark.parametrize("name", ["eager", "llamacpp", "native", "onnxruntime", "openvino", "transformers"])
def test_every_engine_runs_it_and_its_integers(study: Study, integers: Variant, name: str, cache: Path) -> None:
    prompt = tuple(load_tokenizer(study.made.path).prompt_ids("The lazy fox"))
    with opened(name, study.made, cache) as session:
        assert llama.ids(session.submit(Request(0, prompt, 8))) == greedy(study.made, prompt, 8)
    with closing(ENGINES[name].kind(**EXACT).load(integers, cache)) as session:
        assert len(llama.ids(session.submit(Request(0, prompt, 4)))) == 4


def test_it_opens_in_transformers(study: Study) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(study.made.path)
    ours = load_tokenizer(study.made.path)
    text = "The lazy fox, 今天 🙂"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert tokenizer.eos_token_id == ours.eos_id
    model = AutoModelForCausalLM.from_pretrained(study.made.path).eval()
    ids = torch.tensor([ours.prompt_ids(text)])
    with torch.inference_mode():
        expected = load_network(study.made).eval()(ids)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert read_vocabulary(study.made.path, len(study.kept)).specials == {"bos": 0, "eos": 1, "padding": 2}


def test_bits_per_byte_are_those_of_the_same_text(study: Study) -> None:
    """Of text whose tokens all stayed: the old logits, over the tokens that are left."""
    found = scoring.attempt(study.made, study.plan / "tokens", study.plan / "tokenizer", BitsPerByte())
    assert found["why"] == {}
    tokenizer = load_tokenizer(study.made.path)
    model = load_network(study.parent).eval()
    kept = torch.tensor(study.kept)
    tokens, old = Tokens(study.plan / "tokens"), load_tokenizer(study.plan / "tokenizer")
    for language, text in scoring.held_out(tokens, old).items():
        bits = 0.0
        for ids in text.sequences:
            new = [tokenizer.bos_id, *tokenizer.encode(old.decode(ids))]
            with torch.inference_mode():
                logits = model(kept[torch.tensor([new])])[0, :-1].double()[:, kept]
            bits -= float(logits.log_softmax(-1).gather(1, torch.tensor(new[1:])[:, None]).sum()) / math.log(2)
        assert found["languages"][language]["value"] == pytest.approx(bits / sum(text.bytes), rel=1e-4)
        assert found["languages"][language]["n"] == len(text.sequences)


class Line:
    def doing(self, what: str) -> None: ...


@pytest.mark.parametrize("which", ["study", "smallest"])
def test_a_trial_speaks_the_variants_tokenizer(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    study = request.getfixturevalue(which)
    job = Job(
        trial="small-eager",
        variant=study.made.path,
        engine=Eager(**EXACT),
        tasks=study.plan / "tasks",
        tokens=study.plan / "tokens",
        tokenizer=study.plan / "tokenizer",
        cache=tmp_path,
        splits=("validation",),
        scenarios={"qa": Qa(prompt_tokens=16, output_tokens=4, requests=4, warmup=0, patience_seconds=0)},
        baseline=study.parent.path,
        continuation=Continuation(2, 8, 12),
    )
    outcome = measure(job, Line())  # type: ignore[arg-type]
    assert outcome.status == "ok"
    tokenizer, old = load_tokenizer(study.made.path), load_tokenizer(study.plan / "tokenizer")
    limit = max(len(tokenizer.completion_ids(item.expected)) for item in ITEMS) + 4
    for item, row in zip(ITEMS, outcome.predictions, strict=True):
        said = greedy(study.made, tokenizer.prompt_ids(item.prompt), limit)
        said = said[: said.index(tokenizer.eos_id)] if tokenizer.eos_id in said else said
        assert row["output"] == tokenizer.decode(said)
    own = translation(study.plan / "tokenizer", study.made.path)
    assert own is not None
    rows = judge(outcome.continuations, study.parent.path, study.plan / "tokenizer")
    for row, asked in zip(rows, outcome.continuations, strict=True):
        prompt = tuple(own(asked["prompt_ids"], cut=True)[-8:])
        said = own.back(greedy(study.made, prompt, 12), cut=True)
        assert row["output_ids"] == said
        assert row["output"] == old.decode(said)
        assert 0 <= row["tokens_until_divergence"] <= len(said)


def test_a_child_is_shown_the_same_text_in_its_parents_ids(smallest: Study, tmp_path: Path) -> None:
    options = Calibrate(6, 24, tasks=0.5)
    plain, own = (draw(smallest.plan, options, 0, one) for one in (smallest.parent, smallest.made))
    old, new = (load_tokenizer(one.path) for one in (smallest.parent, smallest.made))
    assert own.ids.shape == plain.ids.shape
    assert int(own.ids.max()) < len(smallest.kept)
    for before, after, of, weights in zip(plain.ids[:3], own.ids[:3], own.documents[:3], own.weights[:3], strict=True):
        said = new.decode(after[of >= 0].tolist())
        assert said.rstrip("\ufffd") in old.decode(before.tolist())  # the same text, as far as the row goes
        first = torch.ones_like(of, dtype=torch.bool)
        first[1:] = of[1:] != of[:-1]
        assert torch.equal(weights > 0, ~first & (of >= 0))
    for row, of in zip(own.ids[3:], own.documents[3:], strict=True):
        asked = new.decode(row[of == 0].tolist())
        assert asked in {item.prompt + item.expected for item in ITEMS}
    child, _ = make_variant(Depth(1), smallest.made, own, name="shallow", target=tmp_path / "shallow", seed=0)
    assert child.config["vocab_size"] == len(smallest.kept)


def test_an_lstm_loses_rows_as_well(tmp_path: Path, study: Study) -> None:
    parent = llama.variant(tmp_path / "tokenized" / "v", llama.shape())
    network = lstm(replace(lstm().config, vocab_size=llama.VOCABULARY))
    (tmp_path / "tokenizer").symlink_to(parent.path.parent / "tokenizer")
    checkpoint = write_checkpoint(tmp_path / "lstm", network)
    made = Vocabulary(keep=264, multiple_of=1).compress(checkpoint, study.counts, 0)
    assert made.tensors["model.embed_tokens.weight"].shape[0] == made.config["vocab_size"] == 264


def test_the_same_counts_give_the_same_bytes(tmp_path: Path, study: Study) -> None:
    again, _ = make_variant(study.method, study.parent, study.counts, name="small", target=tmp_path / "again", seed=1)
    assert again.hash == study.made.hash


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": -1}, r"compression\.keep must be at least 0, got -1"),
        ({"least_count": 0}, r"compression\.least_count must be at least 1, got 0"),
        ({"multiple_of": 0}, r"compression\.multiple_of must be at least 1, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Vocabulary(**options)


def test_what_cannot_be_is_refused(tmp_path: Path, study: Study) -> None:
    with pytest.raises(UserError, match=r"compression\.keep must be at least 259 \(bytes and control tokens\), got 99"):
        Vocabulary(keep=99).compress(study.parent, study.counts, 0)
    with pytest.raises(UserError, match=r"compression\.keep must be below the parent's 320 tokens, got 320"):
        Vocabulary(keep=320).compress(study.parent, study.counts, 0)
    with pytest.raises(
        UserError, match="least_count must leave fewer than the parent's 320 tokens, got 1, which keeps 320"
    ):
        Vocabulary(multiple_of=320).compress(study.parent, study.counts, 0)
    with pytest.raises(UserError, match="vocabulary needs calibration text, got none"):
        Vocabulary().compress(study.parent, None, 0)
    quantised, _ = make_variant(Rtn(), study.parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match="vocabulary needs a float parent"):
        Vocabulary().compress(quantised, study.counts, 0)
    with pytest.raises(UserError, match=r"has the plan's tokenizer, got .*small with another"):
        counted(study.plan, study.made)
    words: Variant = write_variant(tmp_path / "words" / "v")
    with pytest.raises(UserError, match="must hold a BPE tokenizer, got 'WordLevel'"):
        Vocabulary().compress(words, study.counts, 0)


def test_only_training_items_are_counted(study: Study) -> None:
    assert f"{len(TaskData(study.plan / 'tasks' / 'lazy').items('train'))} task items" in study.counts.source
    assert Calibrate().rows_for(study.method, study.plan, study.parent, 0).hash == study.counts.hash  # type: ignore[union-attr]
