from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hasten.compression.rtn import Rtn
from hasten.engine import gguf
from hasten.engine.base import Dtype
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.cost import Cost, cost_of
from hasten.model.decoder import Cache, Decoder
from hasten.model.grid import Grid, stored
from hasten.model.layout import Format, Matrix
from tests import tiny
from tests.tiny import decoder, shape, write_checkpoint

WINDOW = 5
MIXED = ["sliding_attention", "full_attention"]
GEMMA: dict[str, Any] = {
    **tiny.GEMMA,
    "local_rope_theta": 10000.0,
    "sliding_window": WINDOW,
    "layer_types": MIXED,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tied_head": False},
    "llama, one key head": {"kv_heads": 1, "layers": 3},
    "llama, wide heads": {"kv_heads": 4, "head_size": 16, "feed_forward_size": 96},
    "llama, biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "tied_head": False},
    "mistral": {"sliding_window": WINDOW, "tied_head": False},
    "qwen2": {"qkv_bias": True},
    "qwen2, sliding": {"qkv_bias": True, "sliding_window": WINDOW, "layer_types": MIXED},
    "qwen3": {"head_norm": True, "head_size": 16},
    "qwen3, sliding": {"head_norm": True, "sliding_window": WINDOW, "layer_types": MIXED},
    "gemma3_text": GEMMA,
}
EACH = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())


def counted(work: Callable[[], Any]) -> int:
    """FLOPs by torch's own counter. The mathematical kernel shows its two products to it; a fused one hides them."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return int(counter.get_total_flops())


def ids(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, tokens, dtype=torch.int64)


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def embedding_row(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> int:
    """What decoding a token does not read: all rows but one of an embedding that is not also the head."""
    return tensors["model.embed_tokens.weight"].nbytes * (config.vocab_size - 1) // config.vocab_size


def as_stored(model: Decoder, tied: bool) -> dict[str, torch.Tensor]:
    """A decoder's tensors, a tied head once."""
    return {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}


@EACH
def test_parameters_are_those_of_the_decoder(changes: dict[str, Any]) -> None:
    config = shape(**changes)
    cost, state = Cost(config), as_stored(Decoder(config), config.tied_head)
    count = {name: value.numel() for name, value in state.items()}
    assert cost.parameters == sum(count.values())
    assert cost.norm_parameters == sum(n for name, n in count.items() if "norm" in name)
    assert cost.bias_parameters == sum(n for name, n in count.items() if name.endswith("bias"))
    block = {name: n for name, n in count.items() if name.startswith("model.layers.0.") and state[name].dim() == 2}
    assert cost.block_parameters == config.layers * sum(block.values())
    embedding = count["model.embed_tokens.weight"]
    others = sum(n for name, n in count.items() if "embed_tokens" not in name)
    assert cost.parameters_per_token == others + (embedding if config.tied_head else config.hidden_size)


@pytest.mark.parametrize(
    ("published", "fields"),
    [
        (1_235_814_400, {"layers": 16, "hidden_size": 2048, "heads": 32, "kv_heads": 8, "feed_forward_size": 8192,
                         "vocab_size": 128256}),  # Llama 3.2 1B
        (7_241_732_096, {"layers": 32, "hidden_size": 4096, "heads": 32, "kv_heads": 8, "feed_forward_size": 14336,
                         "vocab_size": 32000, "sliding_window": 4096, "tied_head": False}),  # Mistral 7B
        (494_032_768, {"layers": 24, "hidden_size": 896, "heads": 14, "kv_heads": 2, "feed_forward_size": 4864,
                       "vocab_size": 151936, "qkv_bias": True}),  # Qwen2 0.5B
        (596_049_920, {"layers": 28, "hidden_size": 1024, "heads": 16, "kv_heads": 8, "head_size": 128,
                       "feed_forward_size": 3072, "vocab_size": 151936, "head_norm": True}),  # Qwen3 0.6B
        (268_098_176, {**GEMMA, "layers": 18, "hidden_size": 640, "heads": 4, "kv_heads": 1, "head_size": 256,
                       "feed_forward_size": 2048, "vocab_size": 262144, "sliding_window": 512,
                       "layer_types": [*(["sliding_attention"] * 5), "full_attention"] * 3}),  # Gemma 3 270M
    ],
)  # fmt: skip
def test_parameters_of_known_models_are_the_published_ones(published: int, fields: dict[str, Any]) -> None:
    assert Cost(ModelConfig(**fields)).parameters == published


@EACH
@pytest.mark.parametrize("tokens", [3, 16])
def test_prefill_flops_are_what_torch_counts(changes: dict[str, Any], tokens: int) -> None:
    """Shorter and longer than the window: a window masks scores, it does not spare their products."""
    config = shape(**changes)
    model = Decoder(config)
    with torch.inference_mode():
        assert Cost(config).prefill_flops(tokens) == counted(lambda: model(ids(tokens)))


@EACH
def test_flops_with_a_cache_are_what_torch_counts(changes: dict[str, Any]) -> None:
    """A prompt whose last position alone gets logits, then one token that is the last of 17."""
    config = shape(**changes)
    model, cache, cost = Decoder(config), Cache(config, 1, 64, torch.float32), Cost(config)
    with torch.inference_mode():
        assert cost.prefill_flops(16, logits=1) == counted(lambda: model(ids(16), cache))
        assert cost.decode_flops(17) == counted(lambda: model(ids(1), cache))


@EACH
def test_training_flops_are_what_torch_counts(changes: dict[str, Any]) -> None:
    config = shape(**changes)
    assert Cost(config).training_flops(3 * 16, 16) == counted(lambda: Decoder(config)(ids(16, 3)).sum().backward())


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    """Any family, with sizes that have nothing in common."""
    changes = dict(draw(st.sampled_from(list(SHAPES.values()))))
    layers, kv_heads, grouped = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * grouped
    if "layer_types" in changes:
        changes["layer_types"] = draw(st.lists(st.sampled_from(MIXED), min_size=layers, max_size=layers))
    if changes.get("sliding_window"):
        changes["sliding_window"] = draw(st.integers(1, 12))
    if not changes.get("qkv_bias"):
        changes["head_size"] = 2 * draw(st.integers(0, 5))
    changes |= {"layers": layers, "heads": heads, "kv_heads": kv_heads}
    changes["hidden_size"] = 2 * heads * draw(st.integers(1, 4))
    changes |= {"feed_forward_size": draw(st.integers(1, 70)), "vocab_size": draw(st.integers(1, 90))}
    return shape(**changes)


@settings(max_examples=30)
@given(config=shapes(), tokens=st.integers(2, 20))
def test_a_decoder_of_any_shape_costs_what_is_counted(config: ModelConfig, tokens: int) -> None:
    model, cache, cost = Decoder(config), Cache(config, 1, 32, torch.bfloat16), Cost(config)
    state = as_stored(model, config.tied_head)
    assert cost.parameters * 4 == cost.weight_bytes() == size(state)
    assert cost.kv_bytes(32) == cache.bytes
    assert cost.training_flops(2 * tokens, tokens) == counted(lambda: model(ids(tokens, 2)).sum().backward())
    with torch.inference_mode():
        assert cost.prefill_flops(tokens) == counted(lambda: model(ids(tokens)))
        assert cost.prefill_flops(tokens, logits=1) == counted(lambda: model(ids(tokens), cache))
        assert cost.decode_flops(tokens + 1) == counted(lambda: model(ids(1), cache))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kv_bytes_are_those_of_an_allocated_cache(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = shape(**changes)
    assert Cost(config).kv_bytes(40, dtype.itemsize) == Cache(config, 1, 40, dtype).bytes


@EACH
def test_kv_bytes_read_are_those_that_attention_is_given(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shape(**changes)
    model, cache = Decoder(config), Cache(config, 1, 64, torch.float32)
    read: list[int] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        read.append(k.numel() + v.numel())
        return attention(q, k, v, **options)

    with torch.inference_mode():
        model(ids(2), cache)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        for positions in range(3, 12):
            read.clear()
            model(ids(1), cache)
            assert sum(read) * 4 == Cost(config).kv_bytes_read(positions, 4)


def test_a_sliding_layer_reads_its_window_and_a_global_one_everything() -> None:
    cost = Cost(shape(**GEMMA))
    one = cost.kv_bytes(1) // 2  # of one of the two layers
    assert [cost.kv_bytes_read(n) for n in (1, WINDOW, 40)] == [2 * one, 2 * WINDOW * one, (WINDOW + 40) * one]
    assert cost.kv_bytes(40) == 80 * one  # all are kept
    assert Cost(shape()).kv_bytes_read(40, 0.5) == Cost(shape()).kv_bytes(40, 0.5) == 40 * one // 2


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_weights_take_the_bytes_of_their_tensors(changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = shape(**changes)
    cost, held = Cost(config), Format.floats(dtype.itemsize)
    tensors = as_stored(Decoder(config).to(dtype), config.tied_head)
    assert cost.weight_bytes(held) == size(tensors)
    unread = 0 if config.tied_head else embedding_row(config, tensors)
    assert cost.weight_bytes_per_token(held) == size(tensors) - unread == cost.parameters_per_token * dtype.itemsize
    assert cost.prefill_weight_bytes(held) == size(tensors) - unread


@EACH
@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 32), (4, 16), (8, 0)])
def test_quantised_weights_take_the_bytes_of_their_stored_tensors(
    changes: dict[str, Any], bits: int, group_size: int, tmp_path: Path
) -> None:
    config = shape(**changes)
    parent = write_checkpoint(tmp_path / "parent", decoder(config))
    made = Rtn(bits=bits, group_size=group_size).compress(parent, None, 0)
    assert made.grid is not None
    cost, held = Cost(config), Format.stored(made.grid)
    assert cost.weight_bytes(held) == size(made.tensors)
    assert cost.weight_bytes_per_token(held) == size(made.tensors) - embedding_row(config, made.tensors)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(3, 96, 32), (5, 128, 64), (1, 64, 0), (2, 30, 6)])
def test_a_matrix_takes_the_bytes_it_is_stored_and_packed_in(
    bits: int, rows: int, columns: int, group_size: int
) -> None:
    grid, matrix = Grid(bits, group_size), Matrix(rows, columns)
    q = torch.zeros(rows, columns, dtype=torch.int8)
    scale = torch.ones(rows, grid.groups(columns))
    assert Format.stored(grid).matrices.bytes_of(matrix) == size(stored("m", q, scale, grid))
    packed = gguf.blocks(q, scale, bits).nbytes if group_size in (32, 64) else q.numel() * bits // 8 + 2 * scale.numel()
    assert Format.packed(grid).matrices.bytes_of(matrix) == packed
    assert Format.stored(grid).matrices.bytes_of(Matrix(rows, columns, 7)) == 7 * size(stored("m", q, scale, grid))


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_weights_that_llama_cpp_reads_are_those_of_its_file(tied_head: bool, bits: int | None, tmp_path: Path) -> None:
    config = shape(tied_head=tied_head)
    checkpoint, held = write_checkpoint(tmp_path / "parent", decoder(config)), Format.floats(4)
    if bits:
        made = Rtn(bits=bits).compress(checkpoint, None, 0)
        assert made.grid is not None
        held, grid = Format.packed(made.grid), made.grid.describe()
        checkpoint = write_checkpoint(tmp_path / "made", decoder(config), tensors=made.tensors, grid=grid)
    facts = gguf.write(checkpoint, Dtype.float32, tmp_path / "model.gguf", text=False)
    assert Cost(config).weight_bytes_per_token(held) == facts["weight_bytes_per_token"]
    assert Cost(config).weight_bytes(held) == facts["weight_bytes"]


def test_groups_that_do_not_divide_a_matrix_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError) as error:
        Cost(shape()).weight_bytes_per_token(Format.packed(Grid(4, 48)))
    assert str(error.value) == "group_size must divide every matrix's input width, got 48 for 32"


def test_the_cost_of_a_shape_is_that_of_its_network() -> None:
    assert cost_of(shape()) == Cost(shape())
