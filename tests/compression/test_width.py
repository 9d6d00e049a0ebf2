from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.width import Kept, Width, grouped, observe, top
from hasten.engine.base import Request
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.decoder import Decoder
from hasten.model.huggingface import load_network
from tests.compression.texts import text
from tests.engine import llama
from tests.engine.engines import ENGINES, opened
from tests.tiny import GEMMA, decoder, lstm, shape, write_checkpoint, write_variant

TEXT = text(12, 16, documents=2, padding=3)
FAMILIES = {
    "llama": shape(),
    "llama-biases": shape(qkv_bias=True, output_bias=True, mlp_bias=True, tied_head=False),
    "mistral": shape(sliding_window=8),
    "qwen2": shape(qkv_bias=True),
    "qwen3": shape(head_norm=True, head_size=16),
    "gemma": shape(layers=3, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"], **GEMMA),
    "gemma-untied": shape(tied_head=False, **GEMMA),
}
NARROW = {"heads": 2, "feed_forward": 0.5, "hidden": 16, "multiple_of": 16}


def pruned(tmp_path: Path, model: Decoder, **options: Any) -> Variant:
    parent = write_variant(tmp_path / "baseline", model)
    method = Width(**{"feed_forward": 0.0, "multiple_of": 16, **options})
    return make_variant(method, parent, TEXT, name="slim", target=tmp_path / "slim", seed=0)[0]


def same_logits(variant: Variant, model: Decoder) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(load_network(variant).eval()(TEXT.ids), model(TEXT.ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_add_nothing_are_the_ones_that_go(family: str, tmp_path: Path) -> None:
    model = decoder(FAMILIES[family])
    idle = torch.arange(64) % 2 == 1
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight[:, idle if number % 2 else ~idle] = 0
    variant = pruned(tmp_path, model, feed_forward=0.5)
    assert variant.config["intermediate_size"] == 32
    assert variant.manifest["notes"]["importance_kept"] == {"heads": 1, "feed_forward": 1, "hidden": 1}
    same_logits(variant, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["of each group one", "a whole group"])
def test_heads_that_add_nothing_are_the_ones_that_go(family: str, way: str, tmp_path: Path) -> None:
    model = decoder(FAMILIES[family])
    width = model.config.head_width
    idle = [0, 3] if way == "of each group one" else [0, 1]
    with torch.no_grad():
        for block in model.model.layers:
            for head in idle:
                block.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    variant = pruned(tmp_path, model, **({"heads": 2} if way == "of each group one" else {"kv_heads": 1}))
    heads, kv_heads = (variant.config[f"num_{name}_heads"] for name in ("attention", "key_value"))
    assert (heads, kv_heads) == ((2, 2) if way == "of each group one" else (2, 1))
    same_logits(variant, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_dimensions_that_are_always_zero_are_the_ones_that_go(family: str, tmp_path: Path) -> None:
    model = decoder(replace(FAMILIES[family], norm_epsilon=1e-12))  # which is not of the stream, so not divided
    idle = torch.tensor([place % 4 < 2 for place in range(32)])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, idle] = 0
        for block in model.model.layers:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                linear = block.get_submodule(name)
                linear.weight[idle] = 0
                if linear.bias is not None:
                    linear.bias[idle] = 0
    variant = pruned(tmp_path, model, hidden=0.5)
    assert variant.config["hidden_size"] == 16
    assert load_network(variant).config.head_width == model.config.head_width
    same_logits(variant, model)


def test_importances_are_those_of_the_formulas_in_float64() -> None:
    model = decoder(FAMILIES["llama-biases"])
    found = observe(model, TEXT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[1]
    for name in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
        block.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update(
                {name: args[0].double(), f"{name} out": output.double()}
            )
        )
    with torch.no_grad():
        model.model(TEXT.ids, documents=TEXT.documents)
    heads, channels = torch.zeros(4).double(), torch.zeros(64).double()
    out, down = (block.get_submodule(name).weight.double() for name in ("self_attn.o_proj", "mlp.down_proj"))
    energy = torch.zeros(32).double()
    for row, documents in enumerate(TEXT.documents):
        real = documents >= 0
        attended = seen["self_attn.o_proj"][row][real].view(-1, 4, 8)
        added = torch.einsum("thd,ohd->tho", attended, out.view(32, 4, 8))
        heads += added.norm(dim=-1).mean(0) ** 2
        channels += (seen["mlp.down_proj"][row][real].abs().mean(0) * down.norm(dim=0)) ** 2
        energy += seen["input_layernorm"][row][real].square().sum(0)
    torch.testing.assert_close(found.heads[1], heads.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.channels[1], channels.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.energy["model.layers.1.input_layernorm"], energy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_dimensions_importance_is_summed_over_the_norms_that_read_the_stream(family: str) -> None:
    model = decoder(FAMILIES[family])
    second = "pre_feedforward_layernorm" if family == "gemma" else "post_attention_layernorm"
    readers = [block.get_submodule(name) for block in model.model.layers for name in ("input_layernorm", second)]
    total = torch.zeros(32).double()
    for module in [*readers, model.model.norm]:
        outputs: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        with torch.no_grad():
            model.model(TEXT.ids, documents=TEXT.documents)
        handle.remove()
        means = [row[of >= 0].double().abs().mean(0) for row, of in zip(outputs[0], TEXT.documents, strict=True)]
        total += torch.stack(means).square().sum(0).sqrt()
    torch.testing.assert_close(observe(model, TEXT).hidden, total, rtol=1e-5, atol=0)


def test_the_best_groups_stay_with_their_best_heads() -> None:
    before, after = shape(heads=8, kv_heads=4, hidden_size=64), shape(heads=2, kv_heads=2, hidden_size=64)
    scores = torch.tensor([1.0, 9.0, 5.0, 5.0, 7.0, 0.0, 0.5, 0.5])
    assert grouped(scores, after, before) == ([1, 4], [0, 2])
    assert grouped(scores, replace(after, heads=4), before) == ([0, 1, 2, 3], [0, 1])
    assert top(torch.tensor([2.0, 3.0, 2.0, 2.0]), 2) == [0, 1]


def test_what_stays_is_the_same_weights(tmp_path: Path) -> None:
    model = decoder(FAMILIES["llama-biases"])
    variant = pruned(tmp_path, model, **NARROW)
    found = observe(model, TEXT)
    after = load_network(variant).config
    kept = Kept.best(after, model.config, found)
    old, new = model.state_dict(), variant.tensors()
    rows = [head * 8 + place for head in kept.heads[0] for place in range(8)]
    name = "model.layers.0.self_attn."
    assert torch.equal(new[f"{name}q_proj.weight"], old[f"{name}q_proj.weight"][rows][:, kept.hidden])
    assert torch.equal(new[f"{name}q_proj.bias"], old[f"{name}q_proj.bias"][rows])
    assert torch.equal(new[f"{name}o_proj.weight"], old[f"{name}o_proj.weight"][kept.hidden][:, rows])
    assert torch.equal(new[f"{name}o_proj.bias"], old[f"{name}o_proj.bias"][kept.hidden])
    name = "model.layers.1.mlp."
    assert torch.equal(new[f"{name}up_proj.weight"], old[f"{name}up_proj.weight"][kept.channels[1]][:, kept.hidden])
    assert torch.equal(new[f"{name}down_proj.weight"], old[f"{name}down_proj.weight"][kept.hidden][:, kept.channels[1]])
    assert torch.equal(new["lm_head.weight"], old["lm_head.weight"][:, kept.hidden])
    shares = variant.manifest["notes"]["importance_kept"]
    assert all(0.4 < share < 1 for share in shares.values())


def test_norms_stay_bit_for_bit_where_the_stream_is_as_wide(tmp_path: Path) -> None:
    model = decoder(FAMILIES["gemma"])
    tensors = pruned(tmp_path, model, feed_forward=0.5).tensors()
    norms = [name for name in tensors if "norm" in name]
    assert len(norms) == 3 * 6 + 1
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in norms)


def test_an_untrained_network_can_be_narrowed(tmp_path: Path) -> None:
    model = decoder()
    model.initialise(0)
    notes = pruned(tmp_path, model, **NARROW).manifest["notes"]
    assert notes["importance_kept"]["heads"] == notes["importance_kept"]["feed_forward"] == 1


def test_a_norm_gives_values_as_large_as_before(tmp_path: Path) -> None:
    model = decoder(shape(layers=1))
    slim = load_network(pruned(tmp_path, model, hidden=16)).eval()
    kept = top(observe(model, TEXT).hidden, 16)
    with torch.inference_mode():
        before = model.model.layers[0].input_layernorm(model.model.embed(TEXT.ids))[..., kept]
        after = slim.model.layers[0].input_layernorm(slim.model.embed(TEXT.ids))
    assert float(after.square().mean()) == pytest.approx(float(before.square().mean()), rel=0.1)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_it_opens_in_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    variant = pruned(tmp_path, decoder(FAMILIES[family]), **NARROW)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(variant.path).eval()(TEXT.ids[:2]).logits
        torch.testing.assert_close(load_network(variant).eval()(TEXT.ids[:2]), theirs, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def narrow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Variant, Variant]:
    """A pruned network of a family, and its integers."""
    folder = tmp_path_factory.mktemp("narrow")
    config: ModelConfig = {"gemma3": llama.gemma("SF")}.get(request.param) or llama.CASES[request.param]
    parent = llama.variant(folder / "baseline", config)
    method = Width(heads=2, feed_forward=0.5, hidden=32, multiple_of=32)
    slim, _ = make_variant(method, parent, TEXT, name="slim", target=folder / "slim", seed=0)
    int8, _ = make_variant(Rtn(bits=8), slim, None, name="int8", target=folder / "int8", seed=0)
    assert int8.lineage == ["baseline", "slim", "int8"]
    assert slim.weight_bytes < 0.6 * parent.weight_bytes
    return slim, int8


@pytest.mark.parametrize("name", ["eager", "llamacpp", "native", "onnxruntime", "openvino", "transformers"])
def test_every_engine_runs_it_and_its_integers(narrow: tuple[Variant, Variant], name: str, cache: Path) -> None:
    prompt = llama.prompt(9)
    model, expected = load_network(narrow[0]).eval(), list(prompt)
    with torch.inference_mode():
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    with opened(name, narrow[0], cache, max_context=64) as session:
        assert llama.ids(session.submit(Request(0, prompt, 8))) == expected[9:]
    with closing(ENGINES[name].kind(threads=1, max_context=64).load(narrow[1], cache)) as session:
        assert len(llama.ids(session.submit(Request(0, prompt, 4)))) == 4


def test_the_parents_type_stays_and_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    model = decoder(FAMILIES["gemma"])
    tensors = {name: value.bfloat16() for name, value in write_checkpoint(tmp_path / "a", model).tensors().items()}
    parent = write_checkpoint(tmp_path / "b", model, tensors=tensors)
    made = [
        make_variant(Width(**NARROW), parent, TEXT, name="v", target=tmp_path / name, seed=seed)[0]
        for seed, name in enumerate(("one", "two"))
    ]
    assert made[0].hash == made[1].hash
    assert {value.dtype for value in made[0].tensors().values()} == {torch.bfloat16}
    assert made[0].config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": -1}, r"compression\.heads must be 0 \(as it is\), a share or a whole number, got -1"),
        ({"hidden": 20.5}, r"compression\.hidden must be 0 .* got 20.5"),
        ({"feed_forward": 0.0}, r"compression\.heads, kv_heads, feed_forward or hidden must be above 0, got 0 for all"),
        ({"multiple_of": 0}, r"compression\.multiple_of must be at least 1, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Width(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feed_forward": 64}, r"compression\.feed_forward must leave less than the parent's 64, got 64 \(64\)"),
        ({"feed_forward": 0.9}, r"compression\.feed_forward must leave less than the parent's 64, got 0.9 \(64\)"),
        ({"hidden": 40}, r"compression\.hidden must leave less than the parent's 32, got 40 \(48\)"),
        (
            {"heads": 3},
            r"compression\.heads must be a multiple of the 2 key/value heads that stay and at most 4, got 3",
        ),
        ({"kv_heads": 1, "heads": 3}, r"key/value heads that stay and at most 2, got 3"),
        ({"kv_heads": 2}, r"compression\.kv_heads must leave less than the parent's 2, got 2"),
    ],
)
def test_sizes_that_the_parent_does_not_have_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        pruned(tmp_path, decoder(), **options)


def test_a_shape_that_no_family_has_is_refused(tmp_path: Path) -> None:
    model = decoder(shape(hidden_size=48, heads=6, kv_heads=3))
    with pytest.raises(UserError, match=r"width would make a shape that no family has: model\.heads must divide"):
        pruned(tmp_path, model, hidden=32)


def test_width_needs_text_a_decoder_and_floats(tmp_path: Path) -> None:
    parent = write_variant(tmp_path / "baseline")
    with pytest.raises(UserError, match="width needs calibration text, got none"):
        Width().compress(parent, None, 0)
    quantised, _ = make_variant(Rtn(), parent, None, name="q", target=tmp_path / "q", seed=0)
    with pytest.raises(UserError, match="width needs a float parent"):
        Width().compress(quantised, TEXT, 0)
    with pytest.raises(UserError, match="width is for decoders"):
        Width().compress(write_checkpoint(tmp_path / "lstm", lstm()), TEXT, 0)
