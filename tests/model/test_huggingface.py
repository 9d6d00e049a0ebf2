from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hasten.artifacts import Checkpoint, Variant, read_json
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.errors import UserError
from hasten.model.decoder import Decoder
from hasten.model.huggingface import finite, load_network, network_tensors, save_checkpoint
from tests.tiny import decoder, shape, write_checkpoint, write_variant

IDS = torch.tensor([[0, 5, 17, 60, 3, 99, 42, 8]])


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(IDS).logits
    return logits


def our_logits(model: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(IDS)
    return logits


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_head": False, "kv_heads": 1}, {"rope_theta": 500.0, "norm_epsilon": 1e-3, "head_size": 12}],
)
def test_a_saved_checkpoint_opens_in_transformers_with_equal_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = decoder(shape(**changes), spread=0.2)
    write_checkpoint(tmp_path / "c", model)
    assert torch.allclose(transformers_logits(tmp_path / "c"), our_logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tied", "head", "group_size"), [(True, True, 16), (True, False, 32), (False, True, 0)])
def test_a_quantised_variant_opens_in_transformers_with_the_logits_of_our_dequantised_decoder(
    tmp_path: Path, bits: int, tied: bool, head: bool, group_size: int
) -> None:
    model = decoder(shape(tied_head=tied), spread=0.2)
    parent = write_variant(tmp_path / "baseline", model)
    method = Rtn(bits=bits, group_size=group_size, head=head)
    variant, _ = make_variant(method, parent, None, name="q", target=tmp_path / "q", seed=0)
    quantised = load_network(variant)
    assert quantised.config.tied_head is (tied and not head)
    ours = our_logits(quantised)
    assert torch.allclose(transformers_logits(variant.path), ours, rtol=0, atol=1e-4)
    assert not torch.allclose(ours, our_logits(model), atol=1e-2)  # quantising did change them


def test_a_checkpoint_that_transformers_wrote_gives_equal_logits_here(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_theta=777.0, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "kind": "checkpoint"}')
    ids = IDS % 50
    with torch.inference_mode():
        expected, ours = theirs(ids).logits, load_network(Checkpoint(tmp_path)).eval()(ids)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-4)


def test_the_tokenizer_and_the_ids_travel_with_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    write_checkpoint(tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert tokenizer.encode("w5 w99", add_special_tokens=False) == [5, 99]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert GenerationConfig.from_pretrained(tmp_path / "c").eos_token_id == 1


def test_the_licence_travels_from_what_a_checkpoint_was_made_from(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    for name in ("LICENSE.txt", "NOTICE", "README.md"):
        (parent.path / name).write_text(f"the {name}")
    child, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    assert (child.path / "LICENSE.txt").read_text() == "the LICENSE.txt"
    assert (child.path / "NOTICE").read_text() == "the NOTICE"
    assert not (child.path / "README.md").exists()
    save_checkpoint(tmp_path / "c", child.config, child.tensors(), child.path, {"kind": "checkpoint"})
    assert (tmp_path / "c" / "LICENSE.txt").is_file()


def test_files_of_its_own_replace_inherited_ones(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent")
    (parent.path / "tokenizer.model").write_bytes(b"stale")
    save_checkpoint(tmp_path / "c", parent.config, parent.tensors(), parent.path, {"kind": "checkpoint"})
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == b"stale"
    files = {"tokenizer.json": {"mine": 1}, "tokenizer.model": None}
    save_checkpoint(tmp_path / "d", parent.config, parent.tensors(), parent.path, {"kind": "checkpoint"}, files)
    assert read_json(tmp_path / "d" / "tokenizer.json") == {"mine": 1}
    assert not (tmp_path / "d" / "tokenizer.model").exists()
    assert (tmp_path / "d" / "tokenizer_config.json").is_file()


def test_saving_and_loading_changes_no_bit_and_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = decoder()
    first, second = write_checkpoint(tmp_path / "a", model), write_checkpoint(tmp_path / "b", decoder())
    assert first.hash == second.hash
    loaded = load_network(first).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert "lm_head.weight" not in network_tensors(model)  # a tied head is stored once


def test_a_loaded_tied_head_stays_tied(tmp_path: Path) -> None:
    model = load_network(write_checkpoint(tmp_path / "c"), torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype is torch.bfloat16


def damaged(tmp_path: Path, change: dict[str, torch.Tensor | None]) -> Checkpoint:
    checkpoint = write_checkpoint(tmp_path / "c")
    tensors: dict[str, torch.Tensor | None] = {**checkpoint.tensors(), **change}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, checkpoint.path / "model.safetensors")
    return checkpoint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, "do not fit config.json: model.norm.weight"),
        ({"extra.weight": torch.ones(1)}, "do not fit config.json: extra.weight"),
        ({"model.norm.weight": torch.ones(31)}, "do not fit config.json: model.norm.weight"),
        ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight holds NaN or infinite values"),
        ({"model.norm.weight": torch.full((32,), torch.inf)}, "model.norm.weight holds NaN or infinite values"),
    ],
)
def test_tensors_that_do_not_make_the_model_are_refused_by_name(
    tmp_path: Path, change: dict[str, torch.Tensor | None], words: str
) -> None:
    with pytest.raises(UserError) as error:
        load_network(damaged(tmp_path, change))
    assert words in str(error.value)


def test_many_problems_are_counted_not_listed(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c")
    config = {**checkpoint.config, "num_hidden_layers": 1}
    (checkpoint.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="and 6 more"):  # the second block's 9 tensors
        load_network(Variant(checkpoint.path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_in_a_million_is_found(value: float) -> None:
    tensor = torch.zeros(2**10 + 1, 2**10)
    assert finite(tensor)
    tensor[-1, -1] = value
    assert not finite(tensor)
    assert finite(torch.zeros(0, 3))
    assert finite(torch.ones(3, dtype=torch.int8))
