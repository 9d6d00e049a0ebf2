"""Where each family's tensors and numbers go in a GGUF file, and what llama.cpp's own implementation leaves out.

llama.cpp has a graph of its own for each architecture, and reads from the file what that graph needs, so "the same
model" is a matter of details. A Llama's query and key matrices change the order of their rows, because llama.cpp turns
neighbouring pairs (2i, 2i + 1) of a head in RoPE where Hugging Face checkpoints turn (i, i + D/2); a Qwen's and a
Gemma's do not. Gemma's norm weights are stored less one by Hugging Face and whole by llama.cpp. Llama 3's stretched
rotary angles are a tensor of divisors, linear ones a number. Gemma's score scale is fixed by llama.cpp: another one
goes into the weights of the query norm, which rotation leaves alone.

What a graph leaves out is refused with the reason, never computed otherwise: llama.cpp knows no sliding window but
Gemma's, and of Gemma's layers only "every n-th is global". All of it is checked against the wheel, family by family,
in tests/engine/test_llamacpp_families.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hasten.model.config import ModelConfig, RopeKind

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
"""llama.cpp's name for each family."""

GEMMA_27B_LAYERS = 62
"""llama.cpp knows Gemma 3 27B by its layers and scales its scores by the width that hidden_size / heads would give."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its names in the checkpoint and in GGUF (without `.weight` or `.bias`: that is `part`) and its shape.

    heads: whose pairs change places (0: none do). offset: the checkpoint stores it less one. factor: what is multiplied
    into it.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0
    part: str = "weight"
    offset: bool = False
    factor: float = 1.0


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name for what computes this."""
    return ARCHITECTURES[config.family]


def refusal(config: ModelConfig, max_context: int | None = None) -> str | None:
    """What llama.cpp's implementation of this family leaves out, as a reason, or None.

    max_context: tokens that will ever be attended to; None means as many as the model was made for.
    """
    name, theirs = config.family, architecture(config)
    gemma = theirs == "gemma3"
    if config.output_bias and theirs != "llama":
        return f"llama.cpp's {theirs} reads no bias of o_proj, this {name} has one (attention_bias)"
    if config.rope_scaling.kind is RopeKind.llama3 and theirs != "llama":
        return f"llama.cpp's {theirs} cannot stretch rotary positions as llama3 does, only linearly"
    if theirs == "qwen2" and config.heads * config.head_width != config.hidden_size:
        return (
            f"llama.cpp's qwen2 needs heads x head_dim to be hidden_size ({config.hidden_size}), "
            f"got {config.heads} x {config.head_width}"
        )
    if gemma and sliding_period(config) is None:
        return (
            "llama.cpp's gemma3 can only say that every n-th layer is global and all others slide, "
            f"got layer_types {_shown(config)}"
        )
    if config.sliding_layers and not gemma:
        needed = min(max_context or config.context, config.context)
        if config.sliding_window < needed:
            return (
                f"llama.cpp's {theirs} has no sliding window: engine.max_context must be at most this {name}'s "
                f"sliding_window ({config.sliding_window}), got {needed}"
            )
    return None


def _shown(config: ModelConfig) -> str:
    """`SSFS`: S slides, F is full."""
    return "".join("S" if config.slides(layer) else "F" for layer in range(config.layers))


def sliding_period(config: ModelConfig) -> int | None:
    """n, where every n-th layer is global and all others slide: 0 if all slide, 1 if none does, else None."""
    slides = [config.slides(layer) for layer in range(config.layers)]
    if all(slides):
        return 0
    period = slides.index(False) + 1
    return period if slides == [(layer + 1) % period != 0 for layer in range(config.layers)] else None


def usable_context(config: ModelConfig) -> int:
    """The longest context for which llama.cpp computes this model."""
    if config.sliding_layers and architecture(config) != "gemma3":
        return min(config.context, config.sliding_window)
    return config.context


def entries(config: ModelConfig, *, head: bool) -> Iterator[Entry]:
    """Every tensor, in the order of the file. head: it has an output matrix of its own."""
    offset = config.offset_norms
    hidden = (config.hidden_size,)
    yield Entry("model.embed_tokens", "token_embd", (config.vocab_size, config.hidden_size))
    if config.rope_scaling.kind is RopeKind.llama3:
        yield Entry("rope_freqs", "rope_freqs", (config.head_width // 2,))
    for i in range(config.layers):
        source, name = f"model.layers.{i}", f"blk.{i}"
        yield Entry(f"{source}.input_layernorm", f"{name}.attn_norm", hidden, offset=offset)
        yield from _attention(config, f"{source}.self_attn", name)
        if config.post_norms:
            yield Entry(f"{source}.post_attention_layernorm", f"{name}.post_attention_norm", hidden, offset=offset)
            yield Entry(f"{source}.pre_feedforward_layernorm", f"{name}.ffn_norm", hidden, offset=offset)
        else:
            yield Entry(f"{source}.post_attention_layernorm", f"{name}.ffn_norm", hidden, offset=offset)
        yield from _feed_forward(config, f"{source}.mlp", name)
        if config.post_norms:
            yield Entry(f"{source}.post_feedforward_layernorm", f"{name}.post_ffw_norm", hidden, offset=offset)
    yield Entry("model.norm", "output_norm", hidden, offset=offset)
    if head:
        yield Entry("lm_head", "output", (config.vocab_size, config.hidden_size))


def _attention(config: ModelConfig, source: str, name: str) -> Iterator[Entry]:
    width, hidden = config.head_width, config.hidden_size
    turns = architecture(config) == "llama"
    for ours, theirs, heads, rotated in (
        ("q_proj", "attn_q", config.heads, turns),
        ("k_proj", "attn_k", config.kv_heads, turns),
        ("v_proj", "attn_v", config.kv_heads, False),
    ):
        turned = heads if rotated else 0
        yield Entry(f"{source}.{ours}", f"{name}.{theirs}", (heads * width, hidden), turned)
        if config.qkv_bias:
            yield Entry(f"{source}.{ours}", f"{name}.{theirs}", (heads * width,), turned, "bias")
    yield Entry(f"{source}.o_proj", f"{name}.attn_output", (hidden, config.heads * width))
    if config.output_bias:
        yield Entry(f"{source}.o_proj", f"{name}.attn_output", (hidden,), part="bias")
    if config.head_norm:
        factor, offset = _score_factor(config), config.offset_norms
        yield Entry(f"{source}.q_norm", f"{name}.attn_q_norm", (width,), offset=offset, factor=factor)
        yield Entry(f"{source}.k_norm", f"{name}.attn_k_norm", (width,), offset=offset)


def _score_factor(config: ModelConfig) -> float:
    """By how much this model's scores are larger than the ones that llama.cpp would scale."""
    if architecture(config) != "gemma3":
        return 1.0
    theirs = config.hidden_size // config.heads if config.layers == GEMMA_27B_LAYERS else config.head_width
    factor = config.score_scale * float(theirs) ** 0.5
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _feed_forward(config: ModelConfig, source: str, name: str) -> Iterator[Entry]:
    hidden, inner = config.hidden_size, config.feed_forward_size
    for ours, theirs, shape in (
        ("gate_proj", "ffn_gate", (inner, hidden)),
        ("up_proj", "ffn_up", (inner, hidden)),
        ("down_proj", "ffn_down", (hidden, inner)),
    ):
        yield Entry(f"{source}.{ours}", f"{name}.{theirs}", shape)
        if config.mlp_bias:
            yield Entry(f"{source}.{ours}", f"{name}.{theirs}", shape[:1], part="bias")


def describe(writer: Any, config: ModelConfig, kind: str) -> None:
    """The hyperparameters llama.cpp reads. No names or dates: the same variant gives the same bytes.

    writer: a `gguf.GGUFWriter` of this architecture. kind: the type of the matrices; of several, the file is called by
    the first.
    """
    import gguf

    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind.split()[0]}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(usable_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.feed_forward_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    if config.rope_scaling.kind is RopeKind.linear:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if architecture(config) == "gemma3" and config.sliding_layers:
        writer.add_sliding_window(config.sliding_window)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", sliding_period(config))
        writer.add_float32("gemma3.rope.freq_base_swa", config.local_rope_theta or config.rope_theta)
