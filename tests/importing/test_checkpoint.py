from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hasten.artifacts import Checkpoint, digest, read_json, write_json
from hasten.compression.identity import Identity
from hasten.compression.make import make_variant
from hasten.errors import UserError
from hasten.importing.checkpoint import import_checkpoint, source_digest
from hasten.model.huggingface import load_network, network_tensors, save_checkpoint
from hasten.model.imported import Huggingface
from tests.importing.arrivals import (
    SHAPES,
    UNCHECKED,
    bring,
    leftovers,
    tensors_of,
    write_source,
    write_tensors,
)
from tests.tiny import decoder, shape, write_tokenizer

IDS = torch.tensor([[0, 5, 17, 60, 3, 99, 42, 8, 9, 10]])


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_network(Checkpoint(folder)).eval()(IDS)
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_family_arrives_whole(tmp_path: Path, name: str, shards: int) -> None:
    config = shape(**SHAPES[name])
    base = bring(write_source(tmp_path / "source", config, shards=shards))
    with torch.inference_mode():
        assert torch.equal(logits(base), decoder(config, spread=0.2)(IDS))
    assert Checkpoint(base).manifest["kind"] == "checkpoint"
    assert sorted(path.name for path in base.iterdir()) == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_stay_in_the_type_they_came_in_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = bring(write_source(tmp_path / "source", dtype=dtype))
    sent, received = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "base"))
    assert sent.keys() == received.keys()
    assert all(received[name].dtype == dtype and torch.equal(received[name], value) for name, value in sent.items())
    assert read_json(base / "config.json")["dtype"] == str(dtype).removeprefix("torch.")


def test_of_several_types_config_names_one_that_holds_them_all(tmp_path: Path) -> None:
    tensors = tensors_of(shape(), torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
    base = bring(write_source(tmp_path / "source", tensors=tensors))
    assert read_json(base / "config.json")["dtype"] == "float32"
    assert Checkpoint(base).tensors()["model.norm.weight"].dtype == torch.float16


def test_what_is_tuned_in_float32_says_so(tmp_path: Path) -> None:
    base = Checkpoint(bring(write_source(tmp_path / "source", dtype=torch.bfloat16)))
    save_checkpoint(tmp_path / "tuned", base.config, network_tensors(load_network(base)), base.path, {})
    assert (base.config["dtype"], read_json(tmp_path / "tuned/config.json")["dtype"]) == ("bfloat16", "float32")


def test_a_network_without_its_head_is_given_the_prefix(tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): value for name, value in tensors_of(shape()).items()}
    base = bring(write_source(tmp_path / "source", tensors=bare))
    assert Checkpoint(base).tensors().keys() == tensors_of(shape()).keys()


def test_what_follows_from_config_is_not_kept(tmp_path: Path) -> None:
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    base = bring(write_source(tmp_path / "source", tensors=tensors_of(shape()) | more))
    assert Checkpoint(base).tensors().keys() == tensors_of(shape()).keys()


def test_a_tied_head_that_is_stored_twice_is_kept_once_and_another_is_a_head_of_its_own(tmp_path: Path) -> None:
    tensors = tensors_of(shape())
    head = tensors["model.embed_tokens.weight"].clone()
    write_source(tmp_path / "source", tensors={**tensors, "lm_head.weight": head})
    base = bring(tmp_path / "source")
    assert "lm_head.weight" not in Checkpoint(base).tensors()
    assert read_json(base / "config.json")["tie_word_embeddings"] is True
    write_tensors(tmp_path / "source", {**tensors, "lm_head.weight": head + 1})
    base = bring(tmp_path / "source")
    assert torch.equal(Checkpoint(base).tensors()["lm_head.weight"], head + 1)
    assert read_json(base / "config.json")["tie_word_embeddings"] is False
    with torch.inference_mode():
        model = load_network(Checkpoint(base)).eval()
        assert torch.equal(model(IDS), torch.nn.functional.linear(model.hidden(IDS), head + 1))


def test_config_is_normalised_and_takes_the_tokenizers_ids(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", rope_theta=None, head_dim=None, bos_token_id=77)
    config = read_json(bring(source) / "config.json")
    assert (config["rope_theta"], config["head_dim"]) == (10000.0, 8)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)


def test_whatever_else_ends_an_answer_is_kept_behind_the_tokenizers_end(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", eos_token_id=[7, 1])
    assert read_json(bring(source) / "generation_config.json")["eos_token_id"] == [1, 7]
    write_json(source / "generation_config.json", {"eos_token_id": [9, 1, 5000, "x", True], "temperature": 0.7})
    base = bring(source)
    assert read_json(base / "generation_config.json")["eos_token_id"] == [1, 9]
    assert read_json(base / "config.json")["eos_token_id"] == [1, 9]


def test_the_licence_and_the_chat_template_travel_to_every_derivative(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "LICENSE").write_text("the model's terms")
    (source / "Notice.txt").write_text("as they write it")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    (tokenizer / "LICENSE").write_text("the tokenizer's terms")
    base = bring(source, tokenizer=tokenizer)
    make_variant(Identity(), Checkpoint(base), None, name="v", target=tmp_path / "v", seed=0)
    for folder in (base, tmp_path / "v"):
        assert (folder / "LICENSE").read_text() == "the model's terms"
        assert (folder / "LICENSE.tokenizer").read_text() == "the tokenizer's terms"
        assert (folder / "Notice.txt").read_text() == "as they write it"
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_licence_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (tmp_path / "id_rsa").write_text("secret")
    (source / "LICENSE").symlink_to("../id_rsa")
    assert "LICENSE must be a file of its folder, got a link to" in refusal(source)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shape(**SHAPES["gemma3_text"]), shards=2)
    assert digest(bring(source, Huggingface(verify_tokens=4))) == digest(bring(source, Huggingface(verify_tokens=4)))


# what is done to a sound checkpoint -> what the sentence says
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "an architecture that is not covered": (
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
        "model_type must be one of llama, mistral, qwen2, qwen3, gemma3_text, got 'gpt_neox'",
    ),
    "no architecture": ({"model_type": None}, "model_type must be one of llama"),
    "an LSTM": ({"model_type": "hasten_lstm"}, "got 'hasten_lstm'"),
    "code of its own": ({"auto_map": {"AutoModel": "modeling.py"}}, "auto_map names code of the checkpoint's own"),
    "weights somebody else quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        "got 'gptq'; import the float",
    ),
    "a field that is missing": ({"hidden_size": None}, "config.json lacks hidden_size"),
    "a field of another type": ({"num_hidden_layers": "two"}, "num_hidden_layers must be a whole number, got 'two'"),
    "a number as a word": ({"rms_norm_eps": "small"}, "config.json: rms_norm_eps must be a finite number, got 'small'"),
    "a shape that makes no sense": ({"num_key_value_heads": 3}, "kv_heads must divide model.heads (4), got 3"),
    "too many layers": ({"num_hidden_layers": 3}, "the weights lack model.layers.2.input_layernorm.weight, "),
    "too few layers": ({"num_hidden_layers": 1}, "config.json has no place for model.layers.1.input_layernorm.weight"),
    "absurdly many layers": (
        {"num_hidden_layers": 1_000_000_000},
        "num_hidden_layers is 1000000000, the weights hold 20 tensors in all",
    ),
    "an absurd width": (
        {"hidden_size": 2**30, "head_dim": 2**28},
        "must be 100 x 1073741824 by config.json, the weights hold 100 x 32",
    ),
    "an absurd vocabulary": (
        {"vocab_size": 2**31 - 1},
        "model.embed_tokens.weight must be 2147483647 x 32 by config.json, the weights hold 100 x 32",
    ),
    "a feed-forward of another width": (
        {"intermediate_size": 48},
        "mlp.gate_proj.weight must be 48 x 32 by config.json, the weights hold 64 x 32",
    ),
    "a head that is not there": ({"tie_word_embeddings": False}, "the weights lack lm_head.weight, which config.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_cannot_be_used_is_one_sentence(tmp_path: Path, case: str) -> None:
    fields, words = BROKEN[case]
    source = write_source(tmp_path / "source", **fields)
    assert words in refusal(source)


def refusal(source: Path, tokenizer: Path | None = None) -> str:
    """The sentence with which an import is refused; what was there before stays, nothing else is left."""
    target = source.with_name("base")
    target.mkdir(exist_ok=True)
    (target / "before").write_text("what was there before")
    with pytest.raises(UserError) as error:
        bring(source, tokenizer=tokenizer)
    assert [path.name for path in target.iterdir()] == ["before"]
    assert leftovers(source.parent) == []
    sentence = str(error.value)
    assert sentence.startswith(str(source))
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


def test_malformed_json_is_one_sentence(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "llama",')
    assert "config.json is not readable JSON" in refusal(source)
    (source / "config.json").write_text("[]")
    assert "must hold a JSON object, got list" in refusal(source)
    (source / "config.json").unlink()
    assert "config.json does not exist" in refusal(source)


def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    text = (source / "config.json").read_text()
    for number in ("NaN", "1e999"):
        (source / "config.json").write_text(text.replace('"initializer_range": 0.02', f'"initializer_range": {number}'))
        assert "initializer_range must be a finite number" in refusal(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = tensors_of(shape(), torch.bfloat16)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    source = write_source(tmp_path / "source", tensors=tensors)
    assert "tensor model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in refusal(source)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    config = shape(vocab_size=99)
    source = write_source(tmp_path / "source", config)
    assert "the plan's tokenizer must fit the embedding (99 rows), got ids up to 99" in refusal(source)


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    other = write_tokenizer(tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w98"', '"w0"').replace('"w97"', '"w98"'))
    words = "must be the checkpoint's (tokenizer=imported with the same path), got one in which"
    assert f"{words} 'w98' is 97, not 98" in refusal(source, tokenizer=other)
    (other / "tokenizer.json").write_text(text.replace('"w98"', '"elsewhere"'))
    assert f"{words} 'elsewhere' is 98, not unknown" in refusal(source, tokenizer=other)


def test_a_tokenizer_may_end_a_text_with_a_token_that_the_checkpoints_lacks(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    content = read_json(source / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 1]
    del content["model"]["vocab"]["<|eos|>"]
    write_json(source / "tokenizer.json", content)
    assert Checkpoint(bring(source, tokenizer=tokenizer)).manifest["tokenizer_compared"] is True


def test_the_manifest_says_where_no_tokenizer_could_be_compared(tmp_path: Path) -> None:
    source, tokenizer = write_source(tmp_path / "source"), write_tokenizer(tmp_path / "tokenizer")
    (source / "tokenizer.json").unlink()
    assert Checkpoint(bring(source, tokenizer=tokenizer)).manifest["tokenizer_compared"] is False


def test_what_a_killed_import_left_is_swept_away(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    for name in (".base.0123abcd", ".base.notes", ".other.0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    bring(source)
    assert sorted(leftovers(tmp_path)) == [".base.notes", ".other.0123abcd"]


def test_only_what_is_read_counts(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shards=2)
    before = source_digest(source)
    (source / ".git").mkdir()
    (source / ".git/index").write_text("x")
    (source / "optimizer.pt").write_text("x")
    assert source_digest(source) == before
    (source / "LICENSE").write_text("terms")
    assert source_digest(source) != before


def test_a_comparison_that_needs_more_memory_than_is_free_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match=r"GB are free; model\.verify_tokens=0 imports it all the same"):
        bring(source, Huggingface(verify_tokens=4))
    bring(source)


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(UserError, match=r"model\.gguf: a checkpoint is a folder with config\.json and safetensors"):
        import_checkpoint(tmp_path / "model.gguf", tmp_path, UNCHECKED, tmp_path / "base")


def test_a_sentence_stays_short_however_much_is_quoted(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", quantization_config="x" * 10_000)
    assert refusal(source).endswith("...")


def test_what_transformers_wrote_arrives(tmp_path: Path) -> None:
    """Sharded, in bfloat16, by another library's own writer; what is imported opens there again, equal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12}
    theirs = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(torch.bfloat16)
    source = write_tokenizer(tmp_path / "source")
    theirs.save_pretrained(source, max_shard_size="10KB")
    assert (source / "model.safetensors.index.json").is_file()
    base = bring(source, Huggingface(verify_tokens=16))
    sent, received = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval() for folder in (source, base))
    assert received.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(received(IDS).logits, sent(IDS).logits)
    assert AutoTokenizer.from_pretrained(base).encode("w5 w17", add_special_tokens=False) == [5, 17]


def test_the_comparison_with_transformers_is_recorded(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shape(**SHAPES["gemma3_text"]))
    facts = import_checkpoint(source, source, Huggingface(path=str(source), verify_tokens=20), tmp_path / "base")
    assert 0 <= facts["imported_logit_difference"] < 1e-4
    assert facts["imported_bytes"] == 4 * facts["imported_parameters"]
    manifest = read_json(tmp_path / "base" / "manifest.json")
    assert manifest["verified"] == {"against": "transformers", "tokens": 20, "tolerance": 1e-3}
    assert manifest["source"] == {"model_type": "gemma3_text", "sha256": source_digest(source)}
    import_checkpoint(source, source, UNCHECKED, tmp_path / "base")
    assert "verified" not in read_json(tmp_path / "base" / "manifest.json")
