"""Damaged checkpoints, 2,000 of them: each is imported whole or refused in one sentence, never anything else.

Bits are flipped and ends cut off in every file the importer reads; JSON is also damaged with a sense for it: values are
replaced by what nobody expects there.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Checkpoint, write_json
from hasten.errors import UserError
from hasten.importing.checkpoint import import_checkpoint
from hasten.model.huggingface import load_network
from hasten.model.imported import Huggingface
from hasten.tokenizer.base import TrainingText
from hasten.tokenizer.imported import Imported
from tests.importing.arrivals import GEMMA, UNCHECKED, leftovers, write_source
from tests.tiny import shape

NOTHING = TrainingText({}, lambda: iter(()))
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "word",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    {},
    {"rope_type": "yarn"},
    {"a": None},
]
Damage = Callable[[bytes, random.Random], bytes]


def cut(data: bytes, chance: random.Random) -> bytes:
    """Only the beginning."""
    return data[: chance.randrange(len(data.rstrip()))]  # without a last newline JSON is whole


def flip(data: bytes, chance: random.Random) -> bytes:
    """One to eight bits the other way round, anywhere."""
    return _flipped(data, chance, len(data))


def flip_head(data: bytes, chance: random.Random) -> bytes:
    """Bits of a safetensors header: its length (8 bytes) and its JSON."""
    return _flipped(data, chance, 8 + int.from_bytes(data[:8], "little"))


def _flipped(data: bytes, chance: random.Random, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def nonsense(data: bytes, chance: random.Random) -> bytes:
    """One value of a JSON document replaced, removed or added."""
    document = json.loads(data)
    at = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = chance.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and chance.random() < 0.8:
            at = at[key]
            continue
        break
    if chance.random() < 0.15:
        del at[key]
    elif chance.random() < 0.1 and isinstance(at, dict):
        at[chance.choice(("rope_scaling", "auto_map", "layer_types", "eos_token_id", "quantization_config"))] = (
            chance.choice(ODD)
        )
    else:
        at[key] = chance.choice(ODD)
    return json.dumps(document).encode()


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
# which checkpoint, which of its files, what is done to it, how often, and the least share that must be refused: damage
# to bare values, to texts and to what nothing depends on goes unseen
CASES: list[tuple[str, str, Damage, int, float]] = [
    ("single", "model.safetensors", flip_head, 300, 0.5),
    ("single", "model.safetensors", flip, 150, 0.05),
    ("single", "model.safetensors", cut, 100, 1.0),
    ("sharded", SHARD, flip_head, 150, 0.5),
    ("sharded", SHARD, cut, 50, 1.0),
    ("sharded", INDEX, flip, 200, 0.4),
    ("sharded", INDEX, cut, 50, 1.0),
    ("sharded", INDEX, nonsense, 100, 0.25),
    ("single", "config.json", flip, 150, 0.2),
    ("sharded", "config.json", flip, 100, 0.2),
    ("single", "config.json", cut, 50, 1.0),
    ("single", "config.json", nonsense, 100, 0.15),
    ("sharded", "config.json", nonsense, 150, 0.15),
    ("single", "generation_config.json", nonsense, 50, 0.0),
    ("single", "tokenizer.json", flip, 100, 0.2),
    ("single", "tokenizer.json", cut, 50, 1.0),
    ("single", "tokenizer.json", nonsense, 100, 0.2),
    ("single", "tokenizer_config.json", nonsense, 50, 0.05),
    ("single", "special_tokens_map.json", nonsense, 30, 0.0),
    ("single", "special_tokens_map.json", flip, 50, 0.1),
    ("single", "special_tokens_map.json", cut, 20, 1.0),
    ("single", "chat_template.jinja", flip, 30, 0.0),
    ("single", "LICENSE", flip, 20, 0.0),
    ("single", "LICENSE", cut, 20, 0.0),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in one file, a Gemma in two."""
    folder = tmp_path_factory.mktemp("sound")
    small = {"hidden_size": 16, "heads": 2, "kv_heads": 1, "feed_forward_size": 16}
    single = write_source(folder / "single", shape(**small))
    (single / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true}')
    write_json(single / "special_tokens_map.json", {"eos_token": {"content": "<|eos|>"}, "pad_token": "<|pad|>"})
    (single / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}\n")
    (single / "LICENSE").write_text("You may do with it whatever you like.\n")
    return {"single": single, "sharded": write_source(folder / "sharded", shape(**{**GEMMA, **small}), shards=2)}


@pytest.fixture
def _patience() -> Iterator[None]:
    """A case that hangs fails instead."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError("the importer hangs")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def arrive(source: Path, scratch: Path, recipe: Huggingface = UNCHECKED) -> str | None:
    """What `prepare` and `pretrain` do with a checkpoint; the sentence if it is refused."""
    tokenizer, target = scratch / "tokenizer", scratch / "base"
    tokenizer.mkdir(parents=True)
    try:
        Imported(path=str(source)).build(NOTHING, tokenizer)
        import_checkpoint(source, tokenizer, recipe, target)
    except UserError as error:
        assert not target.exists()
        return str(error)
    finally:
        assert leftovers(scratch) == []
    with torch.inference_mode():
        load_network(Checkpoint(target))(torch.tensor([[0, 5, 7]]))  # whole: it loads and runs
    return None


def arrivals(source: Path, scratch: Path, name: str, damage: Damage, count: int, recipe: Huggingface) -> int:
    """How many of `count` damaged copies are refused; each of the others is whole."""
    whole, refused = (source / name).read_bytes(), 0
    for number in range(count):
        chance = random.Random(f"{source.parent.name} {name} {damage.__name__} {number}")
        (source / name).write_bytes(damage(whole, chance))
        signal.alarm(20)
        try:
            sentence = arrive(source, scratch, recipe)
        except BaseException as error:
            pytest.fail(f"case {number}: {type(error).__name__}: {error}")
        if sentence is not None:
            refused += 1
            assert "\n" not in sentence, number
            assert 10 < len(sentence) < 500, number
        shutil.rmtree(scratch)
    return refused


@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize(
    ("kind", "name", "damage", "count", "least"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_damaged_checkpoint_is_imported_whole_or_refused_in_one_sentence(
    sound: dict[str, Path], tmp_path: Path, kind: str, name: str, damage: Damage, count: int, least: float
) -> None:
    source = Path(shutil.copytree(sound[kind], tmp_path / kind / "source"))
    assert arrivals(source, tmp_path / "scratch", name, damage, count, UNCHECKED) >= least * count


@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_with_a_comparison_too_it_is_one_or_the_other(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = Path(shutil.copytree(sound[kind], tmp_path / kind / "source"))
    compared = Huggingface(verify_tokens=4)
    assert arrivals(source, tmp_path / "scratch", "config.json", nonsense, 15, compared) >= 1
    assert leftovers(tmp_path) == []


def test_two_thousand_cases_are_tried() -> None:
    assert sum(count for *_, count, _ in CASES) >= 2000


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_undamaged_they_arrive(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert arrive(sound[kind], tmp_path / "scratch") is None
