from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hasten.artifacts import read_json, write_json
from hasten.errors import UserError
from hasten.importing.weights import INDEX, SINGLE, read_tensors, stored_tensors
from tests.importing.arrivals import tensors_of, write_source
from tests.tiny import shape

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tensors(stored_tensors(folder))
    return str(error.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", shards=2)


def place(folder: Path, **places: str) -> None:
    """Move tensors in the index; dots are written as double underscores."""
    index = read_json(folder / INDEX)
    index["weight_map"] |= {name.replace("__", "."): shard for name, shard in places.items()}
    write_json(folder / INDEX, index)


def test_shards_are_read_as_one(sharded: Path) -> None:
    tensors, expected = read_tensors(stored_tensors(sharded)), tensors_of(shape())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_headers_alone_are_read_at_first(sharded: Path) -> None:
    stored = stored_tensors(sharded)["model.layers.1.mlp.down_proj.weight"]
    assert (stored.dtype, stored.shape, stored.path.parent) == ("F32", (32, 64), sharded)


def test_one_file_goes_before_an_index(sharded: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, sharded / SINGLE)
    assert stored_tensors(sharded).keys() == {"model.norm.weight"}


def test_a_shard_that_is_missing_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert refusal(sharded) == f"{INDEX} names {SECOND}, which does not exist"


def test_an_index_and_shards_that_disagree_are_refused(sharded: Path) -> None:
    place(sharded, model__extra=FIRST)
    assert refusal(sharded) == f"{INDEX} says that {FIRST} holds model.extra, which it does not"
    index = read_json(sharded / INDEX)
    del index["weight_map"]["model.extra"]
    name, shard = next(iter(index["weight_map"].items()))
    del index["weight_map"][name]
    write_json(sharded / INDEX, index)
    assert refusal(sharded) == f"{shard} holds {name}, of which {INDEX} says nothing"


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/model.safetensors", "model.bin", 5, None, ""])
def test_an_index_may_only_name_safetensors_beside_it(sharded: Path, shard: object) -> None:
    place(sharded, model__norm__weight=shard)  # type: ignore[arg-type]
    assert refusal(sharded).startswith(f"{INDEX}: the file of model.norm.weight must be a .safetensors file beside it")


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_refused(sharded: Path, content: dict[str, object]) -> None:
    write_json(sharded / INDEX, content)
    assert "weight_map must name the file of each tensor" in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path / "source")
    (source / SINGLE).rename(source / name)
    sentence = refusal(source)
    assert sentence.startswith(f"{name} would run code when opened")
    assert "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)" in sentence


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / SINGLE).unlink()
    assert refusal(source) == f"it has neither {SINGLE} nor {INDEX}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_types_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {**tensors_of(shape()), "model.norm.weight": torch.ones(32).to(dtype)}
    assert "tensors must be one of F32, F16, BF16, model.norm.weight is" in (
        refusal(write_source(tmp_path / "source", tensors=tensors))
    )


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff" * 100, b"\x02\x00\x00\x00\x00\x00\x00\x00{}more"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    source = write_source(tmp_path / "source")
    (source / SINGLE).write_bytes(content)
    assert refusal(source).startswith(f"{SINGLE} is not a readable safetensors file: ")


def test_a_lack_of_memory_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    stored = stored_tensors(write_source(tmp_path / "source"))
    monkeypatch.setattr("safetensors.safe_open", full)
    with pytest.raises(UserError, match=f"{SINGLE} does not fit into the memory that is free"):
        read_tensors(stored)


def test_what_goes_wrong_elsewhere_keeps_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(value: object) -> None:
        raise TypeError("a bug of ours")

    stored = stored_tensors(write_source(tmp_path / "source"))
    monkeypatch.setattr("torch.isfinite", broken)
    with pytest.raises(TypeError, match="a bug of ours"):
        read_tensors(stored)
