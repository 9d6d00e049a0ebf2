"""A Gemma written as GGUF by us, and read back."""

import pytest
import torch

from hasten.artifacts import Checkpoint, read_json, write_json
from hasten.engine import gguf
from hasten.engine.base import Dtype
from hasten.errors import UserError
from hasten.model.config_json import from_huggingface
from hasten.model.grid import Grid, floats
from hasten.packaged.gemma import unpack
from hasten.packaged.vocabulary import Piece, TokenType, merges, write_tokenizer
from tests.engine import llama

pytest.importorskip("gguf")

SPECIALS = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
LAYERS = "SSSSSFS"  # what no GGUF says, because it is Gemma's architecture: every sixth is global


def pieces():
    normal = ["▁", "a", "b", "ab", "▁a", "▁ab", "aa", "aaa"]
    texts = [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2), ("\n", 4), ("  ", 4)]
    texts += [(text, 1) for text in normal]
    texts += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    return [Piece(text, -float(i), TokenType(kind)) for i, (text, kind) in enumerate(texts)]


def written(folder, tensors=None, grid=None, **changes):
    """A Gemma's checkpoint and its GGUF file."""
    fields = {"local_rope_theta": 10000.0, "sliding_window": 16, "norm_epsilon": 1e-6, **changes}
    config = llama.gemma(LAYERS, **fields)
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer", pieces(), SPECIALS)
    variant = llama.variant(folder / "v", config, tensors or llama.random_tensors(config), grid)
    values = {**variant.config, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    write_json(variant.path / "config.json", values)
    gguf.write(Checkpoint(variant.path), Dtype.float32, folder / "v.gguf")
    return Checkpoint(variant.path), folder / "v.gguf"


def unpacked(file):
    folder = file.with_name("out")
    folder.mkdir()
    unpack(file, folder)
    return Checkpoint(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_comes_back_in_bfloat16(tmp_path, tied):
    source, file = written(tmp_path, tied_head=tied)
    found = unpacked(file)
    assert from_huggingface(found.config) == from_huggingface(source.config)
    tensors, expected = found.tensors(), source.tensors()
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        rounded = ((value + 1) - 1 if "norm" in name else value).bfloat16()
        assert torch.equal(tensors[name], rounded), name


def test_norms_that_were_bfloat16_come_back_exactly(tmp_path):
    config = llama.gemma(LAYERS)
    tensors = llama.random_tensors(config)
    tensors = {name: value.bfloat16().float() for name, value in tensors.items()}
    _, file = written(tmp_path, tensors)
    found = unpacked(file).tensors()
    assert all(torch.equal(found[name].float(), value) for name, value in tensors.items())


def test_integers_come_back_as_their_products_with_the_scales(tmp_path):
    grid = Grid(8, 32)
    config = llama.gemma(LAYERS)
    tensors = llama.quantised(llama.random_tensors(config), grid)
    _, file = written(tmp_path, tensors, grid)
    found, name = unpacked(file).tensors(), "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(found[name], floats(tensors, grid)[name].bfloat16())


def test_the_tokenizer_and_what_ends_a_text_come_back(tmp_path):
    from tokenizers import Tokenizer

    source, file = written(tmp_path)
    found = unpacked(file)
    ours, theirs = (Tokenizer.from_file(str(one.path / "tokenizer.json")) for one in (source, found))
    for text in ("ab a\n  aaaaa", " ab", "<eos>", "é"):
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert read_json(found.path / "generation_config.json")["eos_token_id"] == 1
    assert found.config["bos_token_id"] == 2
    named = read_json(found.path / "tokenizer_config.json")
    assert [named[f"{role}_token"] for role in SPECIALS] == ["<pad>", "<eos>", "<bos>", "<unk>"]


def test_merges_are_every_cut_of_a_piece_in_the_order_of_scores():
    assert list(merges(pieces())) == [
        ("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab"), ("a", "a"), ("aa", "a"), ("a", "aa"),
    ]  # fmt: skip


def test_transformers_opens_what_was_unpacked(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, file = written(tmp_path)
    found = unpacked(file)
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    assert tokenizer("ab\n  a").input_ids == [2, 9, 4, 5, 7]
    model, info = AutoModelForCausalLM.from_pretrained(found.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_another_architecture_and_a_broken_file_are_one_sentence(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    gguf.write(variant, Dtype.float32, tmp_path / "v.gguf")
    with pytest.raises(UserError, match="must hold a gemma3, got 'llama'"):
        unpack(tmp_path / "v.gguf", tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(UserError, match="not a readable GGUF file"):
        unpack(tmp_path / "broken.gguf", tmp_path)
