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

from hasten.artifacts import Checkpoint
from hasten.errors import UserError
from hasten.importing.checkpoint import import_checkpoint
from hasten.model.huggingface import load_network
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
# which checkpoint, which of its files, what is done to it, how often
CASES: list[tuple[str, str, Damage, int]] = [
    ("single", "model.safetensors", flip_head, 300),
    ("single", "model.safetensors", flip, 150),
    ("single", "model.safetensors", cut, 100),
    ("sharded", SHARD, flip_head, 150),
    ("sharded", SHARD, cut, 50),
    ("sharded", INDEX, flip, 200),
    ("sharded", INDEX, cut, 50),
    ("sharded", INDEX, nonsense, 100),
    ("single", "config.json", flip, 150),
    ("sharded", "config.json", flip, 100),
    ("single", "config.json", cut, 50),
    ("single", "config.json", nonsense, 100),
    ("sharded", "config.json", nonsense, 150),
    ("single", "generation_config.json", nonsense, 50),
    ("single", "tokenizer.json", flip, 100),
    ("single", "tokenizer.json", cut, 50),
    ("single", "tokenizer.json", nonsense, 100),
    ("single", "tokenizer_config.json", nonsense, 50),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in one file, a Gemma in two."""
    folder = tmp_path_factory.mktemp("sound")
    small = {"hidden_size": 16, "heads": 2, "kv_heads": 1, "feed_forward_size": 16}
    single = write_source(folder / "single", shape(**small))
    (single / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true}')
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


def arrive(source: Path, scratch: Path) -> str | None:
    """What `prepare` and `pretrain` do with a checkpoint; the sentence if it is refused."""
    tokenizer, target = scratch / "tokenizer", scratch / "base"
    tokenizer.mkdir(parents=True)
    try:
        Imported(path=str(source)).build(NOTHING, tokenizer)
        import_checkpoint(source, tokenizer, UNCHECKED, target)
    except UserError as error:
        assert not target.exists()
        return str(error)
    finally:
        assert leftovers(scratch) == []
    with torch.inference_mode():
        load_network(Checkpoint(target))(torch.tensor([[0, 5, 7]]))  # whole: it loads and runs
    return None


@pytest.mark.usefixtures("_patience")
@pytest.mark.parametrize(("kind", "name", "damage", "count"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_checkpoint_is_imported_whole_or_refused_in_one_sentence(
    sound: dict[str, Path], tmp_path: Path, kind: str, name: str, damage: Damage, count: int
) -> None:
    source = Path(shutil.copytree(sound[kind], tmp_path / "source"))
    whole = (source / name).read_bytes()
    refused = 0
    for number in range(count):
        (source / name).write_bytes(damage(whole, random.Random(f"{kind} {name} {damage.__name__} {number}")))
        scratch = tmp_path / "scratch"
        signal.alarm(20)
        try:
            sentence = arrive(source, scratch)
        except BaseException as error:
            pytest.fail(f"case {number}: {type(error).__name__}: {error}")
        if sentence is not None:
            refused += 1
            assert "\n" not in sentence, number
            assert 10 < len(sentence) < 500, number
        shutil.rmtree(scratch)
    assert refused or (damage is nonsense and name == "generation_config.json")
    if damage is cut:
        assert refused == count


def test_two_thousand_cases_are_tried() -> None:
    assert sum(count for *_, count in CASES) >= 2000


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_undamaged_they_arrive(sound: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert arrive(sound[kind], tmp_path / "scratch") is None
