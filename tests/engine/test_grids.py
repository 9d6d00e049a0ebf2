"""Every engine with a variant whose matrices lie on several grids."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest
import torch

from hasten.artifacts import Variant
from hasten.compression.embedding import Embedding
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.config import discover
from hasten.engine import gguf
from hasten.engine.base import Dtype, Engine, Request, Support
from hasten.engine.compiled import Compiled
from hasten.engine.grids import apart, every
from hasten.engine.llamacpp import Llamacpp
from hasten.engine.native import Native
from hasten.engine.vllm import Vllm, head_named, weight_bytes
from hasten.model.cost import Cost
from hasten.model.grid import Grid, Grids, grid_of, quantised_names
from hasten.model.huggingface import load_network
from hasten.model.layout import Format
from tests.engine import llama
from tests.engine.engines import engine, opened
from tests.engine.llama import far_from_best, ids, prompt

INT4, INT8, ROWS = Grid(4, 32), Grid(8, 32), Grid(8, 0)
CONFIG = llama.shape(tied_head=False)


def spread(more: Grid) -> dict[str, Grid]:
    """Four bits and more in turns, and one matrix of floats."""
    blocks = [f"model.layers.{layer}" for layer in (0, 1)]
    found = dict.fromkeys([f"{blocks[0]}.self_attn.{part}_proj" for part in "qkv"], INT4)
    found |= dict.fromkeys([f"{blocks[1]}.self_attn.{part}_proj" for part in "qkv"], more)
    found |= dict.fromkeys([f"{block}.mlp.{part}_proj" for block in blocks for part in ("gate", "up")], INT4)
    found |= {f"{blocks[0]}.mlp.down_proj": more, f"{blocks[1]}.mlp.down_proj": INT4}
    return found | {f"{blocks[0]}.self_attn.o_proj": INT4, "lm_head": more}  # and the second o_proj is of floats


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    return llama.variant(tmp_path_factory.mktemp("variants") / "v", CONFIG)


@pytest.fixture(scope="module")
def mixed(plain: Variant) -> Variant:
    return llama.on_grids(plain, "mixed", spread(INT8))


@pytest.fixture(scope="module")
def by_row(plain: Variant) -> Variant:
    """8 bits with a scale for each row."""
    return llama.on_grids(plain, "by-row", spread(ROWS))


@pytest.fixture(scope="module")
def torn(plain: Variant) -> Variant:
    """Queries on another grid than keys and values."""
    return llama.on_grids(plain, "torn", {**spread(INT8), "model.layers.1.self_attn.q_proj": INT4})


NATIVELY = {
    "compiled": ("by_row", "int4 group 32 and int8 per channel"),
    "eager": ("mixed", "float32 (dequantised)"),
    "native": ("mixed", "int4 group 32 and int8 group 32"),
    "onnxruntime": ("torn", "int4 block 32 and float32 (dequantised in every pass)"),
    "openvino": ("torn", "int4 group 32 and int8 group 32"),
    "transformers": ("torn", "float32 (dequantised)"),
}


def assert_answers_are_the_networks(name: str, variant: Variant, cache: Path) -> None:
    with opened(name, variant, cache) as session:
        found = ids(session.submit(Request(0, prompt(20), 24)))
    assert len(set(found)) > 3
    assert far_from_best(load_network(variant).eval(), prompt(20), found) < 0.01


@pytest.mark.parametrize("name", NATIVELY)
def test_each_matrix_is_multiplied_as_what_its_own_integers_stand_for(
    request: pytest.FixtureRequest, cache: Path, name: str
) -> None:
    fixture, words = NATIVELY[name]
    variant = request.getfixturevalue(fixture)
    assert engine(name).supports(variant).native_format == words
    assert_answers_are_the_networks(name, variant, cache)


def test_llama_cpp_reads_each_matrix_in_its_own_blocks(mixed: Variant, cache: Path) -> None:
    asked = engine("llamacpp", weight_dtype=Dtype.float16)
    from gguf import GGUFReader

    assert isinstance(asked, Llamacpp)
    assert asked.supports(mixed) == Support("Q4_0 and Q8_0")
    file = GGUFReader(asked.build(mixed, cache) / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert [kinds[f"blk.{i}.{part}.weight"] for part in ("attn_q", "attn_output", "ffn_up") for i in (0, 1)] == [
        "Q4_0", "Q8_0", "Q4_0", "F16", "Q4_0", "Q4_0"
    ]  # fmt: skip
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == ("Q8_0", "F16")
    model, prompts = load_network(mixed).eval(), [prompt(12, seed) for seed in range(12)]
    with closing(asked.load(mixed, cache)) as session:
        assert session.kernel.startswith("Q4_0 and Q8_0 (")
        assert session.arithmetic == "int8"
        firsts = [ids(session.submit(Request(i, one, 1))) for i, one in enumerate(prompts)]
    # Activations are rounded to 8 bits on the way, so near ties may fall otherwise.
    assert sum(far_from_best(model, *pair) == 0 for pair in zip(prompts, firsts, strict=True)) >= 10


def test_a_refusal_names_the_grid_that_cannot_run(mixed: Variant, by_row: Variant) -> None:
    assert Compiled(compile=False, activation_dtype=Dtype.float32).supports(mixed).reason == (
        "int8 group 32: torch's int8 kernel has one scale per row: group_size must be 0, got 32"
    )
    assert gguf.unsupported(by_row) == (
        "int8 per channel: Q8_0 stores a scale for every 32 weights: group_size must be a multiple of 32, got 0"
    )


@pytest.mark.parametrize("engine", [Native(), Compiled(compile=False), Vllm()], ids=lambda engine: engine.name)
def test_engines_that_join_matrices_refuse_those_on_different_grids(engine: Engine, torn: Variant) -> None:
    assert engine.reads(torn).reason == (
        "q_proj, k_proj, v_proj of model.layers.1.self_attn must lie on one grid to be multiplied together, "
        "got int4 group 32, int8 group 32, int8 group 32"
    )


def test_floats_among_matrices_of_one_input_are_told_before_anything_is_loaded() -> None:
    assert "got int8 group 32, floats" in str(apart(Grids({"model.layers.0.mlp.gate_proj": INT8})))
    assert apart(Grids({"model.layers.0.mlp.down_proj": INT8})) is None
    assert apart(INT4) is None


def test_one_grid_is_refused_in_its_own_words() -> None:
    assert every(INT4, lambda grid: Support(reason="no")) == Support(reason="no")
    several = Grids({"a": INT8, "b": INT4})
    assert every(several, lambda grid: Support(grid.words, native=grid is INT4)) == Support(
        "int4 group 32 and int8 group 32", native=False
    )


def test_vllm_finds_each_matrix_in_its_group_by_name(mixed: Variant) -> None:
    """As its layers look for their group: by name, and those that it joins by the names of their parts."""
    assert Vllm().reads(mixed).native_format == "int4 group 32 and int8 group 32"
    found = head_named(mixed.config)["quantization_config"]
    groups = [set(group["targets"]) for group in found["config_groups"].values()]
    assert [group["weights"]["num_bits"] for group in found["config_groups"].values()] == [4, 8]
    assert not groups[0] & groups[1]
    assert "lm_head" in groups[1]
    assert groups[0] | groups[1] == set(quantised_names(mixed.tensors()))
    assert found["ignore"] == ["model.layers.1.self_attn.o_proj"]


def test_bytes_are_counted_matrix_by_matrix(mixed: Variant, tmp_path: Path) -> None:
    cost, grid, tensors = Cost(CONFIG), grid_of(mixed), mixed.tensors()
    assert grid is not None
    assert cost.weight_bytes(Format.stored(grid)) == sum(value.nbytes for value in tensors.values())
    facts = gguf.write(mixed, Dtype.float32, tmp_path / "model.gguf", text=False)
    assert cost.weight_bytes_per_token(Format.packed(grid)) == facts["weight_bytes_per_token"]
    integers = sum(
        tensors[f"{name}.weight_shape"].prod() * grid.of(name).bits // 8 + 2 * tensors[f"{name}.weight_scale"].numel()
        for name in quantised_names(tensors)
    )
    floats = sum(value.numel() for name, value in tensors.items() if name.endswith(".weight") and "embed" not in name)
    assert weight_bytes(cost, grid, 2) == int(integers) + 2 * (floats + CONFIG.hidden_size)


def test_the_checkpoint_opens_in_transformers_with_equal_logits(torn: Variant) -> None:
    from transformers import AutoModelForCausalLM

    asked = torch.tensor([prompt(30)])
    theirs = AutoModelForCausalLM.from_pretrained(torn.path, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        assert torch.allclose(theirs(asked).logits, load_network(torn).eval()(asked), rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=[4, 8])
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """An embedding of integers, which are the head's, too."""
    folder = tmp_path_factory.mktemp("tied")
    plain = llama.variant(folder / "v", llama.shape())
    whole, _ = make_variant(Rtn(bits=4, head=False), plain, None, name="q", target=folder / "q", seed=0)
    return make_variant(Embedding(bits=request.param), whole, None, name="e", target=folder / "e", seed=0)[0]


@pytest.mark.parametrize("name", ["eager", "native"])
def test_an_embedding_of_integers_is_looked_up_and_multiplied_as_what_they_stand_for(
    tied: Variant, cache: Path, name: str
) -> None:
    assert_answers_are_the_networks(name, tied, cache)


def test_llama_cpp_reads_an_embedding_in_its_own_blocks(tied: Variant, cache: Path) -> None:
    asked, grid = engine("llamacpp"), grid_of(tied)
    from gguf import GGUFReader

    assert isinstance(asked, Llamacpp)
    assert grid is not None
    file = GGUFReader(asked.build(tied, cache) / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    assert kinds["token_embd.weight"] == {4: "Q4_0", 8: "Q8_0"}[grid.of("model.embed_tokens").bits]
    assert "output.weight" not in kinds
    model, prompts = load_network(tied).eval(), [prompt(12, seed) for seed in range(12)]
    with closing(asked.load(tied, cache)) as session:
        firsts = [ids(session.submit(Request(i, one, 1))) for i, one in enumerate(prompts)]
        read = session.weight_bytes_per_token
    assert sum(far_from_best(model, *pair) == 0 for pair in zip(prompts, firsts, strict=True)) >= 10
    assert read == Cost(llama.shape()).weight_bytes_per_token(Format.packed(grid))


@pytest.mark.parametrize("name", ["compiled", "onnxruntime", "openvino", "transformers", "vllm"])
def test_engines_that_look_tokens_up_in_floats_refuse_an_embedding_of_integers(name: str, tied: Variant) -> None:
    asked = Vllm() if name == "vllm" else engine(name)  # which says it where it is not installed, too
    words = r"^it looks tokens up in a table of floats, got an embedding in int[48] group 32$"
    assert re.match(words, str(asked.reads(tied).reason))


def test_every_engine_is_asked() -> None:
    assert {*NATIVELY, "llamacpp", "vllm"} == discover("engine").keys()
