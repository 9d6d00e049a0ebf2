"""`hasten.model.decoder` as a compiler likes it: nothing changes its shape, nothing asks where it is.

Keys and values of the whole context are allocated once and written in place; positions, angles and masks are tensors
that come in, so that one graph is right for every token. Queries that share a key/value head become rows of one
product: keys are read once for all of them and never repeated.

Shapes: T new tokens, S tokens attended to, H heads, K key/value heads, G = H / K, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.engine.compiled.kernels import Packed, Product, fixed
from hasten.engine.compiled.matrices import Float, Int8, Stored
from hasten.model.config import Activation, ModelConfig, RopeScaling
from hasten.model.cost import cost_of
from hasten.model.decoder import Norm, frequencies, rotary, rotate


class View(NamedTuple):
    """What the layers of one kind share in one pass: angles (T, D) and what is added to scores, (G * T, S)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor


class Layer(nn.Module):
    """One block with its keys and values, (1, K, length, D) each."""

    keys: Tensor
    values: Tensor

    def __init__(self, config: ModelConfig, number: int, stored: Stored, length: int, kv_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, base = config, f"model.layers.{number}"
        self.qkv = stored.matrix(*(f"{base}.self_attn.{part}_proj" for part in "qkv"))
        self.output = stored.matrix(f"{base}.self_attn.o_proj")
        self.gate_up = stored.matrix(*(f"{base}.mlp.{part}_proj" for part in ("gate", "up")))
        self.down = stored.matrix(f"{base}.mlp.down_proj")
        self.before_attention = norm(config, stored, f"{base}.input_layernorm")
        if config.post_norms:
            self.after_attention = norm(config, stored, f"{base}.post_attention_layernorm")
            self.before_feed = norm(config, stored, f"{base}.pre_feedforward_layernorm")
            self.after_feed = norm(config, stored, f"{base}.post_feedforward_layernorm")
        else:
            self.before_feed = norm(config, stored, f"{base}.post_attention_layernorm")
        if config.head_norm:
            self.query_norm = norm(config, stored, f"{base}.self_attn.q_norm")
            self.key_norm = norm(config, stored, f"{base}.self_attn.k_norm")
        shape = (1, config.kv_heads, length, config.head_width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape, dtype=kv_dtype), persistent=False)

    def forward(self, x: Tensor, at: Tensor, view: View) -> Tensor:
        attended, post = self.attend(self.before_attention(x), at, view), self.config.post_norms
        x = x + (self.after_attention(attended) if post else attended)
        gate, up = self.gate_up(self.before_feed(x)).chunk(2, dim=-1)
        silu = self.config.activation is Activation.silu
        fed = self.down((F.silu(gate) if silu else F.gelu(gate, approximate="tanh")) * up)
        out: Tensor = x + (self.after_feed(fed) if post else fed)
        return out

    def attend(self, x: Tensor, at: Tensor, view: View) -> Tensor:
        config, tokens, span = self.config, len(x), view.mask.shape[1]
        heads, groups, width = config.heads, config.kv_heads, config.head_width
        rows = self.qkv(x).view(tokens, heads + 2 * groups, width).transpose(0, 1)  # (H + 2K, T, D)
        q, k, v = rows.split([heads, groups, groups])
        if config.head_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = rotate(q, view.cos, view.sin), rotate(k, view.cos, view.sin)
        self.keys.index_copy_(2, at, k.to(self.keys.dtype)[None])
        self.values.index_copy_(2, at, v.to(self.values.dtype)[None])
        q = q.to(self.keys.dtype).reshape(1, groups, -1, width)  # (1, K, G * T, D)
        k, v = self.keys[:, :, :span], self.values[:, :, :span]
        if tokens == 1 and x.device.type == "cpu":
            y = attend_one(q[0], k[0], v[0], view.mask, config.score_scale)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask, scale=config.score_scale)
        y = y.to(x.dtype).view(heads, tokens, width).transpose(0, 1)  # (T, H, D)
        out: Tensor = self.output(y.reshape(tokens, heads * width))
        return out


class Network(nn.Module):
    """The decoder for one request at a time. length: positions there is room for. Types are those of `stored`."""

    cos: Tensor
    sin: Tensor
    embedding_scale: Tensor

    def __init__(self, config: ModelConfig, stored: Stored, length: int, kv_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.kv_dtype = config, kv_dtype
        self.embedding = fixed(stored.floats("model.embed_tokens.weight"))
        scale = torch.tensor(config.hidden_size**0.5, dtype=stored.dtype)
        self.register_buffer("embedding_scale", scale, persistent=False)
        self.layers = nn.ModuleList(Layer(config, i, stored, length, kv_dtype) for i in range(config.layers))
        self.slides = [config.slides(number) for number in range(config.layers)]
        self.norm = norm(config, stored, "model.norm")
        if config.tied_head:
            self.head: nn.Module = Float(self.embedding, None)
            self.head.weight = self.embedding  # one parameter, not two on the same memory
        else:
            self.head = stored.matrix("lm_head")
        full = (config.rope_theta, config.rope_scaling)
        sliding = (config.local_rope_theta, RopeScaling()) if config.local_rope_theta else full
        tables = [rotary(torch.arange(length), frequencies(config.head_width, *kind)) for kind in (full, sliding)]
        for name, angles in zip(("cos", "sin"), zip(*tables, strict=True), strict=True):
            self.register_buffer(name, torch.stack(angles), persistent=False)  # (2, length, D): full and sliding layers

    @property
    def weight_bytes(self) -> int:
        """All weights, of integers what the kernels read."""
        return sum(values.nbytes for values in self.parameters())

    @property
    def weight_bytes_per_token(self) -> int:
        """Weights that one token reads: of an embedding of its own, one row."""
        rows = 0 if self.config.tied_head else len(self.embedding) - 1
        return self.weight_bytes - rows * self.embedding[0].nbytes

    def rounded(self) -> list[Int8 | Packed]:
        """The matrices before which activations are rounded."""
        return [
            part for part in self.modules() if isinstance(part, Int8 | Packed) and part.product is not Product.widened
        ]

    @property
    def rounded_share(self) -> float:
        """Of the numbers in matrices that a token is multiplied with: those that meet rounded activations."""
        cost = cost_of(self.config)
        rounded = sum(matrix.numbers for matrix in self.rounded())
        return rounded / sum(matrix.weights for matrix in (*cost.matrices, cost.head))

    @property
    def cache_bytes(self) -> int:
        """Keys and values of all layers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.blocks())

    def blocks(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def clear(self) -> None:
        """Forget every token."""
        for layer in self.blocks():
            layer.keys.zero_()
            layer.values.zero_()

    def step(self, token: Tensor, at: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """One token (1) at its position (1) -> the likeliest next one (1) and the logits (vocabulary)."""
        return self.choose(self.read(token, at, places))

    def read(self, ids: Tensor, at: Tensor, places: Tensor) -> Tensor:
        """ids (T) at their positions (T), which see places (S) = 0, 1, ... -> what the head is to see, (T, hidden)."""
        x = F.embedding(ids, self.embedding)
        if self.config.embedding_scale:
            x = x * self.embedding_scale
        views = [self.view(at, places, slides) for slides in (False, True)]
        for layer, slides in zip(self.layers, self.slides, strict=True):
            x = layer(x, at, views[slides])
        return x

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, from a row (1, hidden) of what `read` returned."""
        logits = self.head(self.norm(x))[0].float()
        return logits.argmax(-1, keepdim=True), logits

    def view(self, at: Tensor, places: Tensor, slides: bool) -> View:
        seen = places <= at[:, None]  # (T, S)
        if slides:
            seen = seen & (places > at[:, None] - self.config.sliding_window)
        mask = torch.zeros_like(seen, dtype=self.kv_dtype).masked_fill(~seen, -torch.inf)
        each = self.config.heads // self.config.kv_heads
        return View(self.cos[int(slides)][at], self.sin[int(slides)][at], mask.repeat(each, 1))


def norm(config: ModelConfig, stored: Stored, name: str) -> Norm:
    weight = stored.floats(f"{name}.weight")
    made = Norm(len(weight), config.norm_epsilon, config.offset_norms)
    made.weight = fixed(weight)
    return made


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (K, G, D), k and v (K, S, D) -> (K, G, D) float32: for one token of its own, as loops for the compiler to join.

    Torch's fused kernel prepares for many queries: with one it took 1.4 ms a layer where this takes 0.6 (bfloat16, 12
    heads of 64, S = 512, one core).
    """
    scores = (q[:, :, None].float() * k[:, None].float()).sum(-1) * scale + mask.float()  # (K, G, S)
    shares = scores.softmax(-1)
    return (shares[..., None] * v[:, None].float()).sum(-2)
