"""The network: a Llama-family decoder (Touvron et al. 2023, arXiv:2302.13971), one sitting to read.

Token ids -> embedding -> `layers` x [attention, feed-forward] -> norm -> head -> logits. Each block
adds to a residual stream; RMSNorm comes before each half. Attention is grouped-query (Ainslie et
al. 2023, arXiv:2305.13245) with rotary positions (Su et al. 2021, arXiv:2104.09864); the
feed-forward is SwiGLU (Shazeer 2020, arXiv:2002.05202).

Why a KV cache: the keys and values of past tokens never change, so decoding one token costs one
pass over the weights instead of one over the whole sequence. At batch 1 that pass reads every
weight once for two FLOPs each: decoding is bound by memory bandwidth, which is why fewer bytes per
weight means more tokens per second.

Modules are named as in Hugging Face checkpoints, so `state_dict()` is the checkpoint.
Shapes: B batch, T new tokens, S tokens attended to, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.model.config import ModelConfig


class Cache:
    """Keys and values of one batch, allocated once: (layers, B, K, context, D) each."""

    def __init__(
        self, config: ModelConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, context, config.head_width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def context(self) -> int:
        """The most tokens the cache can hold."""
        return self.keys.shape[3]

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, D) to a layer; all keys and values so far, (B, K, S, D), as views."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end].to(keys.dtype), self.values[layer, :, :, :end].to(values.dtype)


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)


def rotary(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, (T, D) float32; the two halves of a head share angles."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of (B, H, T, D) by its position's angle."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, self.layer, self.head_width = config.head_width, layer, config.head_width
        self.q_proj = nn.Linear(config.hidden_size, config.heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.heads * width, config.hidden_size, bias=False)
        self.grouped = config.heads != config.kv_heads

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        q = rotate(self.heads(self.q_proj(x)), cos, sin)  # (B, H, T, D)
        k = rotate(self.heads(self.k_proj(x)), cos, sin)  # (B, K, T, D)
        v = self.heads(self.v_proj(x))
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)  # (B, K, S, D)
        tokens = q.shape[2]
        mask = None
        if past and tokens > 1:  # a later chunk of a prompt: causal, but shifted by what is cached
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not past and tokens > 1, enable_gqa=self.grouped
        )
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, hidden)
        return out


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = Norm(config.hidden_size, config.norm_epsilon)
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Stack(nn.Module):
    """Everything below the head (the checkpoint's `model.`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config.hidden_size, config.norm_epsilon)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        cos, sin = rotary(positions, self.config.head_width, self.config.rope_theta)
        x: Tensor = self.embed_tokens(ids)  # (B, T, hidden)
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        if cache is not None:
            cache.length = start + ids.shape[1]
        out: Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """ids (B, T) -> logits (B, T, vocabulary), float32.

    With a `cache`, ids continue what the cache holds, and only the last position's logits,
    (B, 1, vocabulary), are computed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def initialise(self, seed: int) -> None:
        """Random weights for training from scratch.

        Embeddings are normal with `initializer_range`; matrices are normal with 1 / sqrt(input width), so that what
        goes in with unit variance comes out with it; matrices that write into the residual stream start at zero, so
        that every block starts as the identity. Measured: benchmarks/fits.py.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            embedding = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = self.config.initializer_range if embedding else 0.0 if residual else weight.shape[1] ** -0.5
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.model(ids, cache)
        logits: Tensor = self.lm_head(x if cache is None else x[:, -1:])
        return logits.float()
