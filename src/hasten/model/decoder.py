"""The network: a decoder of the Llama family (Touvron et al. 2023, arXiv:2302.13971), one sitting to read.

Token ids -> embedding -> `layers` x [attention, feed-forward] -> norm -> head -> logits. Each block
adds to a residual stream; RMSNorm comes before each half. Attention is grouped-query (Ainslie et
al. 2023, arXiv:2305.13245) with rotary positions (Su et al. 2021, arXiv:2104.09864); the
feed-forward is gated (Shazeer 2020, arXiv:2002.05202). What Mistral (arXiv:2310.06825), Qwen 2 and 3
(arXiv:2407.10671, arXiv:2505.09388) and Gemma 3 (arXiv:2503.19786) do differently is a field of the
config each: sliding windows, biases, normed queries and keys, norms after each half, another gate.

Why a KV cache: the keys and values of past tokens never change, so decoding one token costs one
pass over the weights instead of one over the whole sequence. At batch 1 that pass reads every
weight once for two FLOPs each: decoding is bound by memory bandwidth, which is why fewer bytes per
weight means more tokens per second.

Modules are named as in Hugging Face checkpoints, so `state_dict()` is the checkpoint.
Shapes: B batch, T new tokens, S tokens attended to, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hasten.model.attention import attend
from hasten.model.config import Activation, ModelConfig, RopeKind, RopeScaling
from hasten.model.network import Network, State


class Cache(State):
    """Keys and values of one batch, allocated once: (layers, B, K, context, D) each."""

    def __init__(
        self, config: ModelConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, context, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.padding: Tensor | None = None
        self.length = 0

    @property
    def context(self) -> int:
        """The most tokens the cache can hold."""
        return self.keys.shape[3]

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def clear(self) -> None:
        self.length, self.padding = 0, None

    def extend(self, layer: int, keys: Tensor, values: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) to a layer; its keys and values from `start` on, (B, K, S, D), views if types agree."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        kept = (self.keys[layer, :, :, start:end], self.values[layer, :, :, start:end])
        return kept[0].to(keys.dtype), kept[1].to(values.dtype)


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32. offset: its weight is stored less 1."""

    def __init__(self, width: int, epsilon: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if offset else torch.ones(width))
        self.epsilon, self.offset = epsilon, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        return F.rms_norm(x.float(), weight.shape, 1 + weight if self.offset else weight, self.epsilon).to(x.dtype)


def frequencies(width: int, theta: float, scaling: RopeScaling, device: torch.device | str = "cpu") -> Tensor:
    """By how much each pair of a head turns per position, (D / 2,) float32, in radians.

    linear: Chen et al. 2023, arXiv:2306.15595. llama3: Llama Team 2024, arXiv:2407.21783, as its code has it.
    Rounded in the order in which models are trained: one unit in the last place is 0.01 radians at position 100,000.
    """
    turns = 1 / theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    if scaling.kind is RopeKind.default:
        return turns
    if scaling.kind is RopeKind.linear:
        return turns / scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    within = scaling.original_context / (2 * math.pi / turns)  # whole turns within the original context
    share = ((within - low) / (high - low)).clamp(0, 1)
    return (1 - share) * turns / scaling.factor + share * turns


def rotary(positions: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (..., D) for positions (...); the two halves of a head share angles."""
    angles = positions.float()[..., None] * turns
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of (B, H, T, D) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


@dataclass(frozen=True)
class View:
    """What the layers of one kind share in one pass. mask: (T, S) or (B, 1, T, S), None where `causal` says it all.

    start: the first cached token that anybody here attends to.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool
    start: int = 0


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, hidden, self.layer = config.head_width, config.hidden_size, layer
        self.head_width, self.scale = width, config.score_scale
        self.q_proj = nn.Linear(hidden, config.heads * width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.kv_heads * width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.kv_heads * width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * width, hidden, bias=config.output_bias)
        if config.head_norm:
            self.q_norm = Norm(width, config.norm_epsilon, config.offset_norms)
            self.k_norm = Norm(width, config.norm_epsilon, config.offset_norms)
        self.head_norm = config.head_norm

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)

    def forward(self, x: Tensor, view: View, cache: Cache | None) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, view.cos, view.sin)  # (B, H, T, D)
        k = rotate(k, view.cos, view.sin)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, view.start)  # (B, K, S, D)
        y = attend(q, k, v, mask=view.mask, causal=view.causal, scale=self.scale)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, hidden)
        return out


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.feed_forward_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.silu = config.activation is Activation.silu

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
        out: Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class Block(nn.Module):
    """With `post_norms`, each half is normalised on its way in and on its way out (Gemma's four norms).

    Dropout acts on what each half adds to the residual stream (Vaswani et al. 2017, arXiv:1706.03762, section 5.4).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> Norm:
            return Norm(config.hidden_size, config.norm_epsilon, config.offset_norms)

        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.post_norms = config.post_norms
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()  # with post_norms it follows attention, else it precedes the MLP
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, view: View, cache: Cache | None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), view, cache)
        if self.post_norms:
            x = x + self.dropout(self.post_attention_layernorm(attended))
            gated = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        else:
            x = x + self.dropout(attended)
            gated = self.mlp(self.post_attention_layernorm(x))
        out: Tensor = x + self.dropout(gated)
        return out


class Stack(nn.Module):
    """Everything below the head (the checkpoint's `model.`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config.hidden_size, config.norm_epsilon, config.offset_norms)
        self.slides = [config.slides(layer) for layer in range(config.layers)]

    def forward(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        padding: Tensor | None = None,
        documents: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        assert documents is None or (cache is None and padding is None)
        past = cache.length if cache is not None else 0
        if cache is not None:
            padding = cache.padding = padding if padding is not None else cache.padding
        views = {slides: self.view(ids, past, padding, slides, documents) for slides in sorted(set(self.slides))}
        x = self.embed(ids)
        again = recompute and cache is None and torch.is_grad_enabled()
        for block, slides in zip(self.layers, self.slides, strict=True):
            view = views[slides]
            x = checkpoint(block, x, view, None, use_reentrant=False) if again else block(x, view, cache)
        if cache is not None:
            cache.length = past + ids.shape[1]
        out: Tensor = self.norm(x)
        return out

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block is given: (B, T) -> (B, T, hidden)."""
        x: Tensor = self.embed_tokens(ids)
        if self.config.embedding_scale:
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)
        return x

    def view(
        self, ids: Tensor, past: int, padding: Tensor | None, slides: bool, documents: Tensor | None = None
    ) -> View:
        """Angles and mask for `ids` (B, T) after `past` cached tokens."""
        config, tokens, device = self.config, ids.shape[1], ids.device
        local = slides and config.local_rope_theta > 0
        theta, scaling = (config.local_rope_theta, RopeScaling()) if local else (config.rope_theta, config.rope_scaling)
        turns = frequencies(config.head_width, theta, scaling, device)
        queries = torch.arange(past, past + tokens, device=device)
        if padding is None:
            cos, sin = rotary(queries, turns)  # (T, D)
        else:
            cos, sin = rotary((queries - padding[:, None]).clamp(min=0)[:, None], turns)  # (B, 1, T, D)
        end = past + tokens
        window = config.sliding_window if slides else end
        start = max(0, past + 1 - window)  # what the oldest query here attends to first
        narrow = end - start > window  # some key is out of reach of some query
        if padding is None and documents is None and not narrow and (tokens == 1 or not past):
            return View(cos, sin, None, tokens > 1, start)
        keys = torch.arange(start, end, device=device)
        mask = (keys <= queries[:, None]) & (keys > queries[:, None] - window)  # (T, S)
        if padding is not None:
            real = keys >= padding[:, None, None, None]  # (B, 1, 1, S)
            mask = (mask & real) | (keys == queries[:, None])  # padding attends to itself: no row is empty
        if documents is not None:  # angles stay those of the row: a score depends on a difference of positions alone
            mask = mask & (documents[:, :, None] == documents[:, None, :])[:, None]  # (B, 1, T, T)
        return View(cos, sin, mask, False, start)


class Decoder(Network):
    """ids (B, T) -> logits (B, T, vocabulary), float32.

    With a `cache`, ids continue what the cache holds, and only the last position's logits,
    (B, 1, vocabulary), are computed. padding, (B,): how many ids at the start of each row are padding; a cache
    remembers it.
    """

    config: ModelConfig
    model: Stack

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Stack(config))

    def initialise(self, seed: int) -> None:
        """Random weights for training from scratch.

        Embeddings are normal with `initializer_range`; matrices are normal with 1 / sqrt(input width), so that what
        goes in with unit variance comes out with it; matrices that write into the residual stream start at zero, so
        that every block starts as the identity. Measured: benchmarks/fits.py. Biases start at zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            if weight.dim() < 2:
                continue
            embedding = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = self.config.initializer_range if embedding else 0.0 if residual else weight.shape[1] ** -0.5
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def set_dropout(self, share: float) -> None:
        for block in self.model.layers:
            assert isinstance(block, Block)
            block.dropout.p = share

    def hidden(self, ids: Tensor, prompt_tokens: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(ids, documents=documents, recompute=self.recompute)
        return out

    def new_state(self, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Cache:
        return Cache(self.config, batch, context, dtype, device)

    def forward(self, ids: Tensor, cache: State | None = None, padding: Tensor | None = None) -> Tensor:
        assert cache is None or isinstance(cache, Cache)
        x = self.model(ids, cache, padding, recompute=self.recompute)
        logits: Tensor = self.lm_head(x if cache is None else x[:, -1:])
        return logits.float()
