import gguf as library
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.artifacts import digest
from hasten.engine import gguf
from hasten.engine.base import Dtype
from hasten.engine.gguf_layout import sliding_period
from hasten.errors import UserError
from hasten.model.config import RopeKind, RopeScaling
from hasten.model.grid import Grid, dequantise, floats, portable_scale
from hasten.model.lstm_config import LstmConfig
from hasten.model.shape import write_shape
from tests.engine import llama


def read(path) -> dict:
    """Tensors of a GGUF file by name: (type name, float32 values)."""
    tensors = library.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, library.dequantize(np.array(t.data), t.tensor_type)) for t in tensors}


@st.composite
def grids(draw):
    """Integers over their whole range and scales of either sign that are exact in bfloat16 and float16."""
    bits, group_size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([32, 64, 128]))
    rows, groups, seed = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    q = torch.randint(low, high, (rows, groups * group_size), generator=generator, dtype=torch.int8)
    exponent = torch.randint(-18, 17, (rows, groups), generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (rows, groups), generator=generator)
    return bits, q, signs * portable_scale(torch.rand(rows, groups, generator=generator) * 2.0**exponent)


@settings(max_examples=60, deadline=None)
@given(grids())
def test_blocks_dequantise_to_the_grid_bit_for_bit(sample):
    bits, q, scale = sample
    kind = library.GGMLQuantizationType[gguf.INTEGERS[bits]]
    ours = gguf.blocks(q, scale, bits)
    theirs = library.dequantize(ours, kind)
    assert np.array_equal(theirs.view(np.int32), dequantise(q, scale).numpy().view(np.int32))


def test_blocks_refuse_scales_that_float16_would_round():
    with pytest.raises(UserError, match="exact in float16"):
        gguf.blocks(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[1 / 3]]), 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_of_a_quantised_file_equals_the_variant_in_float32(tmp_path, bits, group_size, tied):
    grid, config = Grid(bits, group_size), llama.shape(tied_head=tied)
    tensors = llama.quantised(llama.random_tensors(config), grid)
    variant = llama.variant(tmp_path / "v", config, tensors, grid)
    facts = gguf.write(variant, Dtype.float32, tmp_path / "v.gguf")
    written = read(tmp_path / "v.gguf")
    expected = floats(tensors, grid)
    matrices = 0
    for entry in gguf.entries(config, head=not tied):
        kind, values = written.pop(f"{entry.name}.weight")
        wanted = expected[f"{entry.source}.weight"]
        if entry.heads:  # undo the order of llama.cpp's pairs
            values = values.reshape(entry.heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        assert np.array_equal(values, wanted.numpy())
        assert kind == ("F32" if wanted.dim() == 1 or "embed" in entry.source else gguf.INTEGERS[bits])
        matrices += kind != "F32"
    assert not written
    assert matrices == 7 * config.layers + (not tied)
    assert facts["format"] == gguf.INTEGERS[bits]


def test_a_quantised_head_is_written_beside_a_float_embedding_that_was_tied(tmp_path):
    grid, config = Grid(8, 32), llama.shape(tied_head=True)
    tensors = llama.random_tensors(config)
    head = llama.quantised({"lm_head.weight": tensors["model.embed_tokens.weight"]}, grid)
    variant = llama.variant(tmp_path / "v", config, {**llama.quantised(tensors, grid), **head}, grid)
    gguf.write(variant, Dtype.float16, tmp_path / "v.gguf")
    written = read(tmp_path / "v.gguf")
    assert written["output.weight"][0] == "Q8_0"
    assert written["token_embd.weight"][0] == "F16"
    assert np.array_equal(written["output.weight"][1], floats(head, grid)["lm_head.weight"].numpy())


@pytest.mark.parametrize(("dtype", "kind"), [(Dtype.float16, "F16"), (Dtype.bfloat16, "BF16"), (Dtype.float32, "F32")])
def test_floats_are_rounded_once_and_norms_stay_float32(tmp_path, dtype, kind):
    config = llama.shape()
    variant = llama.variant(tmp_path / "v", config)
    gguf.write(variant, dtype, tmp_path / "v.gguf")
    written = read(tmp_path / "v.gguf")
    down = variant.tensors()["model.layers.1.mlp.down_proj.weight"]
    assert written["blk.1.ffn_down.weight"][0] == kind
    assert np.array_equal(written["blk.1.ffn_down.weight"][1], down.to(getattr(torch, dtype.name)).float().numpy())
    assert written["blk.1.ffn_norm.weight"][0] == written["output_norm.weight"][0] == "F32"
    assert ("output.weight" in written) is False


def test_bytes_per_token_leave_out_the_embedding_only_where_the_head_is_another_matrix(tmp_path):
    config = llama.shape(tied_head=False)
    rows = config.vocab_size * config.hidden_size * 4
    untied = gguf.write(llama.variant(tmp_path / "u", config), Dtype.float32, tmp_path / "u.gguf")
    assert untied["weight_bytes"] - untied["weight_bytes_per_token"] == rows - config.hidden_size * 4
    tied = gguf.write(llama.variant(tmp_path / "t", llama.shape()), Dtype.float32, tmp_path / "t.gguf")
    assert tied["weight_bytes"] == tied["weight_bytes_per_token"] == untied["weight_bytes"] - rows


def test_the_same_variant_gives_the_same_bytes(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    for name in ("a", "b"):
        gguf.write(variant, Dtype.float16, tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"bits": 8, "group_size": 0, "symmetric": True}, "multiple of 32, got 0"),
        ({"bits": 4, "group_size": 48, "symmetric": True}, "multiple of 32, got 48"),
        ({"bits": 4, "group_size": 32, "symmetric": False}, "symmetric"),
        ({"bits": 3, "group_size": 32, "symmetric": True}, "bits must be one of [4, 8], got 3"),
    ],
)
def test_grids_that_llamacpp_has_no_blocks_for_are_refused_with_the_reason(tmp_path, grid, words):
    variant = llama.variant(tmp_path / "v", llama.shape())
    variant.manifest["grid"] = grid
    assert words in str(gguf.unsupported(variant))


def test_what_has_no_blocks_is_not_written(tmp_path):
    rows = llama.on_grid(llama.variant(tmp_path / "v", llama.shape()), 8, 0)
    with pytest.raises(UserError, match="group_size must be a multiple of 32, got 0"):
        gguf.write(rows, Dtype.float32, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


BIASES = {"qkv_bias": True, "output_bias": True}
LLAMA3 = RopeScaling(RopeKind.llama3, 8.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (llama.shape(head_norm=True, **BIASES), "qwen3 reads no bias of o_proj"),
        (llama.gemma("SF", **BIASES), "gemma3 reads no bias of o_proj"),
        (llama.shape(head_norm=True, rope_scaling=LLAMA3), "qwen3 cannot stretch rotary positions as llama3"),
        (llama.shape(qkv_bias=True, rope_scaling=LLAMA3), "qwen2 cannot stretch rotary positions as llama3"),
        (llama.gemma("SF", rope_scaling=LLAMA3), "gemma3 cannot stretch rotary positions as llama3"),
        (llama.shape(qkv_bias=True, head_size=32), r"needs heads x head_dim to be hidden_size (64), got 4 x 32"),
        (llama.gemma("FSS"), "every n-th layer is global and all others slide, got layer_types FSS"),
        (llama.gemma("SSFSF"), "got layer_types SSFSF"),
        (llama.shape(sliding_window=100), "at most this mistral's sliding_window (100), got 256"),
        (llama.shape(head_norm=True, sliding_window=100), "at most this qwen3's sliding_window (100), got 256"),
        (llama.shape(qkv_bias=True, sliding_window=100), "at most this qwen2's sliding_window (100), got 256"),
    ],
)
def test_what_llamacpp_leaves_out_of_a_family_is_refused_with_the_reason(tmp_path, config, words):
    variant = llama.variant(tmp_path / "v", config)
    assert words in str(gguf.unsupported(variant))


def test_a_window_counts_only_as_far_as_the_engine_goes(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape(sliding_window=100))
    assert gguf.unsupported(variant, 100) is None
    assert "(100), got 101" in str(gguf.unsupported(variant, 101))
    assert "(100), got 256" in str(gguf.unsupported(variant, 4096))
    assert gguf.write(variant, Dtype.float32, tmp_path / "v.gguf", text=False)["context"] == 100


def test_an_lstm_and_an_unknown_architecture_are_refused_by_name(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    lstm = write_shape(LstmConfig(vocab_size=320), bos_id=0, eos_id=1, pad_id=2)
    variant.__dict__["config"] = lstm
    assert "config.json: model_type must be one of llama, mistral, qwen2, qwen3, gemma3_text, got 'hasten_lstm'" in str(
        gguf.unsupported(variant)
    )
    variant.__dict__["config"] = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    assert "got 'mamba'" in str(gguf.unsupported(variant))


def test_a_gemma_that_cannot_be_said_is_not_written(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.gemma("FS"))
    with pytest.raises(UserError, match=r"cannot be written as GGUF.*every n-th layer"):
        gguf.write(variant, Dtype.float32, tmp_path / "v.gguf", text=False)
    assert not (tmp_path / "v.gguf").exists()


@pytest.mark.parametrize(
    ("layers", "period"), [("SSS", 0), ("FFF", 1), ("SFSF", 2), ("SSFS", 3), ("SSSSSF", 6), ("FS", None), ("SFF", None)]
)
def test_the_period_of_global_layers(layers, period):
    assert sliding_period(llama.gemma(layers)) == period


def test_a_gemmas_norms_are_written_whole_and_carry_the_score_scale(tmp_path):
    config = llama.gemma("SF", attention_scale=4**-0.5)  # twice what llama.cpp takes for heads 16 wide
    variant = llama.variant(tmp_path / "v", config)
    gguf.write(variant, Dtype.bfloat16, tmp_path / "v.gguf", text=False)
    written, tensors = read(tmp_path / "v.gguf"), variant.tensors()
    for name, source, factor in (
        ("output_norm", "model.norm", 1),
        ("blk.1.post_ffw_norm", "model.layers.1.post_feedforward_layernorm", 1),
        ("blk.0.attn_k_norm", "model.layers.0.self_attn.k_norm", 1),
        ("blk.0.attn_q_norm", "model.layers.0.self_attn.q_norm", 2),
    ):
        kind, values = written[f"{name}.weight"]
        assert kind == "F32"
        assert np.array_equal(values, (factor * (1 + tensors[f"{source}.weight"])).numpy())


def test_biases_change_places_with_their_rows_and_stay_float32(tmp_path):
    config = llama.shape(qkv_bias=True, output_bias=True)
    variant = llama.variant(tmp_path / "v", config)
    facts = gguf.write(variant, Dtype.float16, tmp_path / "v.gguf", text=False)
    written, bias = read(tmp_path / "v.gguf"), variant.tensors()["model.layers.0.self_attn.q_proj.bias"]
    kind, values = written["blk.0.attn_q.bias"]
    assert kind == "F32"
    assert values[:4].tolist() == [float(bias[i]) for i in (0, 8, 1, 9)]  # heads are 16 wide
    assert facts["weight_bytes"] == sum(np.prod(v.shape) * (4 if k == "F32" else 2) for k, v in written.values())


def test_a_grid_with_blocks_and_a_float_variant_are_supported(tmp_path):
    variant = llama.variant(tmp_path / "v", llama.shape())
    assert gguf.unsupported(variant) is None
    variant.manifest["grid"] = Grid(4, 128).describe()
    assert gguf.unsupported(variant) is None


NAN = torch.full((64,), float("nan"))


@pytest.mark.parametrize(
    ("changes", "dtype", "words"),
    [
        ({"model.norm.weight": None}, Dtype.float32, "lacks model.norm.weight"),
        ({"model.norm.weight": torch.ones(63)}, Dtype.float32, r"shape \(64,\) by config.json, got \(63,\)"),
        ({"model.norm.weight": NAN}, Dtype.float32, "model.norm holds NaN"),
        ({"model.embed_tokens.weight": torch.full((320, 64), 1e6)}, Dtype.float16, "float16 cannot hold"),
    ],
)
def test_a_corrupt_checkpoint_is_one_sentence(tmp_path, changes, dtype, words):
    variant = llama.rewrite(llama.variant(tmp_path / "v", llama.shape()), changes)
    with pytest.raises(UserError, match=words):
        gguf.write(variant, dtype, tmp_path / "v.gguf", text=False)


def test_integers_without_a_declared_grid_are_refused(tmp_path):
    config = llama.shape()
    tensors = llama.quantised(llama.random_tensors(config), Grid(8, 32))
    with pytest.raises(UserError, match="declares no grid"):
        gguf.write(llama.variant(tmp_path / "v", config, tensors), Dtype.float32, tmp_path / "v.gguf")
