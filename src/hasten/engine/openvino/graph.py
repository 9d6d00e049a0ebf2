"""A decoder as an OpenVINO graph, built from a checkpoint's own tensors: its integers go in as they are.

OpenVINO's CPU plugin finds patterns and puts one node in their place; what is found decides how fast a graph runs, so
this one is written in patterns. A quantised matrix is a constant of integers, (rows, groups, group), converted,
multiplied by its scales and reshaped: a product with compressed weights, which reads 4 or 8 bits per weight. RMSNorm
and rotary positions (the halves of a head split along axis 3, the right one negated) become a node each. Matrices of
integers that read the same values (queries, keys and values; gate and up) lie below each other and are one product.

Attention is PagedAttention (Kwon et al. 2023, arXiv:2309.06180): the tokens of all sequences of a pass lie behind each
other, keys and values in blocks of 32 positions, and a table says which blocks are whose. It is the operation that
OpenVINO's own server puts into a model; here it is written down directly, with its window and its scale, so that
sliding layers do not depend on a mask being recognised. Its inputs change from release to release: `RELEASE`.

Shapes: T tokens of a pass, N blocks, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hasten.engine.openvino.runtime import runtime
from hasten.errors import UserError
from hasten.model.config import Activation, ModelConfig, RopeScaling
from hasten.model.low_rank_config import ranks

if TYPE_CHECKING:
    from torch import Tensor

    from hasten.model.grid import Grid, Grids

RELEASE = "2026.4"
"""The release of OpenVINO whose PagedAttention has the inputs of `attention`."""
BLOCK = 32
"""Positions whose keys and values lie together; the CPU plugin knows no other size."""
SEQUENCES = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
"""Inputs that say, of each sequence of a pass, what is cached already, where its tokens begin, and its blocks."""
UNUSED = (
    *(("int32", (0,)), ("int32", (0,)), ("int32", (0,)), ("float32", (0,))),  # eviction of old keys
    *(("float32", (0,)), ("int32", ()), ("int32", ()), ("float32", (0, 0, 0, 0))),  # sparse prompts, attention sinks
    *(("int32", ()), ("int32", (0,)), ("int32", (0,)), ("int32", (0,))),  # eviction by diversity
    *(("int32", (0,)), ("uint8", (0,)), ("int32", (0,))),  # images, trees of guesses
)
"""What PagedAttention's inputs from the fourteenth on are for, and their types and shapes when they say nothing."""
Node = Any


class Graph:
    """Builds the graph; `bytes` and `bytes_per_token` count its weights as the plugin keeps them.

    tensors: as stored. weight_dtype: `float32` or `bfloat16`, of what is stored as floats. float_bytes: of each of them
    in a product: beside float32 activations the plugin widens all floats.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        grid: Grid | Grids | None,
        weight_dtype: str,
        float_bytes: int,
    ) -> None:
        self.openvino: Any = runtime()
        self.ops: Any = import_module("openvino.opset15")
        self.config, self.grid, self.weight_dtype = config, grid, weight_dtype
        self.tensors, self.float_bytes = tensors, float_bytes
        self.inputs: list[Node] = []
        self.bytes = self.bytes_per_token = 0

    def model(self) -> Any:
        """Inputs are int32: `input_ids` and `position_ids` (T,), `SEQUENCES`, `max_context_len` (), and `wanted`, the
        tokens whose logits are asked for; and `key_cache.0` ..., (N, K, 32, D). Output: (wanted, 1, vocabulary).
        """
        ops, config = self.ops, self.config
        ids, positions, *self.sequences = (self.input(name, [-1]) for name in ("input_ids", "position_ids", *SEQUENCES))
        self.longest, wanted = self.input("max_context_len", []), self.input("wanted", [-1])
        x = self.embedding(ids)  # (T, 1, hidden)
        scaled = self.rotary(positions, config.rope_theta, config.rope_scaling)
        local = self.rotary(positions, config.local_rope_theta, RopeScaling()) if config.local_rope_theta else scaled
        for layer in range(config.layers):
            x = self.block(x, layer, local if config.slides(layer) else scaled)
        x = self.norm(ops.gather(x, wanted, self.integers(0)), "model.norm", config.hidden_size)
        head = "lm_head" if {"lm_head.weight", "lm_head.weight_packed"} & self.tensors.keys() else "model.embed_tokens"
        logits = ops.result(self.linear(x, head, config.vocab_size, config.hidden_size))
        logits.output(0).set_names({"logits"})
        return self.openvino.Model([logits], self.inputs, "hasten")

    def input(self, name: str, shape: list[int], kind: str = "i32") -> Node:
        node = self.ops.parameter(shape, getattr(self.openvino.Type, kind), name=name)
        node.output(0).set_names({name})
        self.inputs.append(node)
        return node

    def integers(self, *values: int) -> Node:
        """(n,) int32."""
        import numpy as np

        return self.ops.constant(np.array(values, np.int32))

    def number(self, value: float) -> Node:
        import numpy as np

        return self.ops.constant(np.float32(value))

    def stored(self, name: str, *shape: int) -> Tensor:
        """A float tensor of the checkpoint. Raises `UserError` if it is missing, misshapen or not finite."""
        if name not in self.tensors:
            raise UserError(f"model.safetensors lacks {name}")
        return checked(name, self.tensors[name], shape)

    def floats(self, parts: dict[str, int], columns: int) -> Node:
        """Matrices of the checkpoint below each other as float32, held as `weight_dtype`; `parts` has their rows."""
        import torch

        values = torch.cat([self.stored(f"{name}.weight", rows, columns).float() for name, rows in parts.items()])
        if self.weight_dtype == "float32":
            return self.ops.constant(values.numpy())
        half = self.openvino.Tensor(self.openvino.Type.bf16, self.openvino.Shape(list(values.shape)))
        half.data.view("int16")[...] = values.bfloat16().view(torch.int16).numpy()
        return self.ops.convert(self.openvino.op.Constant(half), self.openvino.Type.f32)

    def quantised(self, parts: dict[str, int], columns: int) -> Node:
        """Matrices of integers on one grid below each other, float32 to the graph around them; `parts` has their rows.

        Raises `UserError` if they do not fit config.json.
        """
        import torch

        from hasten.model.grid import integers

        if self.grid is None:
            raise UserError("the checkpoint stores integers but its manifest declares no grid")
        read = {name: integers(self.tensors, name, self.grid) for name in parts}
        for name, (q, scale) in read.items():
            checked(name, q, (parts[name], columns))
            checked(name, scale, tuple(scale.shape))
        q, scale = (torch.cat(one) for one in zip(*read.values(), strict=True))
        whole = constant(q.view(len(q), scale.shape[1], -1), self.grid.of(next(iter(parts))).bits)
        scales = self.ops.constant(scale.unsqueeze(-1).contiguous().numpy())
        values = self.ops.multiply(self.ops.convert(whole, self.openvino.Type.f32), scales)
        return self.ops.reshape(values, self.integers(len(q), columns), False)

    def linear(self, x: Node, name: str, rows: int, columns: int) -> Node:
        """x (..., columns) -> (..., rows)."""
        if rank := ranks(self.config).get(name):
            return self.linear(self.linear(x, f"{name}.in_proj", rank, columns), f"{name}.out_proj", rows, rank)
        return self.products(x, {name: rows}, columns)[0]

    def linears(self, x: Node, parts: dict[str, int], columns: int) -> list[Node]:
        """x (..., columns) -> (..., rows) for each name and its rows, by one product where integers lie on one grid.

        Floats stay apart: joined, bfloat16 decodes at 60% of the speed (2026.4.1).
        """
        kinds = {self.layout(name) for name in parts}
        if len(kinds) == 1 and None not in kinds and not parts.keys() & ranks(self.config).keys():
            return self.products(x, parts, columns)
        return [self.linear(x, name, rows, columns) for name, rows in parts.items()]

    def layout(self, name: str) -> Grid | None:
        """The grid of a matrix, None if it is stored as floats."""
        packed = f"{name}.weight_packed" in self.tensors
        return self.grid.of(name) if self.grid and packed else None

    def products(self, x: Node, parts: dict[str, int], columns: int) -> list[Node]:
        """As `linears`, of matrices that are stored alike."""
        import numpy as np

        rows = sum(parts.values())
        if any(f"{name}.weight_packed" in self.tensors for name in parts):
            weight = self.quantised(parts, columns)
            assert self.grid is not None
            groups = sum(self.tensors[f"{name}.weight_scale"].numel() for name in parts)
            bits = self.grid.of(next(iter(parts))).bits
            held = rows * columns * bits // 8 + 4 * groups  # the plugin widens scales to float32
        else:
            weight = self.floats(parts, columns)
            held = rows * columns * self.float_bytes
        self.bytes, self.bytes_per_token = self.bytes + held, self.bytes_per_token + held
        y = self.ops.matmul(x, weight, False, True)
        cut = [y]
        if len(parts) > 1:
            axis, lengths = self.ops.constant(np.int32(-1)), self.integers(*parts.values())
            cut = self.ops.variadic_split(y, axis, lengths).outputs()
        return [self.biased(one, name, count) for one, (name, count) in zip(cut, parts.items(), strict=True)]

    def biased(self, y: Node, name: str, rows: int) -> Node:
        """y (..., rows) and the bias, if there is one."""
        if f"{name}.bias" not in self.tensors:
            return y
        return self.ops.add(y, self.ops.constant(self.stored(f"{name}.bias", rows).float().numpy()))

    def embedding(self, ids: Node) -> Node:
        rows, hidden = self.config.vocab_size, self.config.hidden_size
        row = hidden * (4 if self.weight_dtype == "float32" else 2)
        self.bytes, self.bytes_per_token = self.bytes + rows * row, self.bytes_per_token + row
        table = self.floats({"model.embed_tokens": rows}, hidden)
        x = self.ops.gather(table, self.ops.reshape(ids, self.integers(-1, 1), False), self.integers(0))
        return self.ops.multiply(x, self.number(hidden**0.5)) if self.config.embedding_scale else x

    def norm(self, x: Node, name: str, width: int) -> Node:
        ops = self.ops
        weight = self.stored(f"{name}.weight", width).float() + (1 if self.config.offset_norms else 0)
        squares = ops.reduce_mean(ops.power(x, self.number(2)), self.integers(-1), True)
        root = ops.sqrt(ops.add(squares, self.number(self.config.norm_epsilon)))
        return ops.multiply(ops.constant(weight.numpy()), ops.multiply(x, ops.divide(self.number(1), root)))

    def rotary(self, positions: Node, theta: float, scaling: RopeScaling) -> tuple[Node, Node]:
        """cos and sin of the angles, (T, 1, 1, D)."""
        from hasten.model.decoder import frequencies

        ops = self.ops
        turns = ops.constant(frequencies(self.config.head_width, theta, scaling).view(1, 1, 1, -1).numpy())
        where = ops.convert(ops.reshape(positions, self.integers(-1, 1, 1, 1), False), self.openvino.Type.f32)
        half = ops.multiply(where, turns)
        angles = ops.concat([half, half], -1)
        return ops.cos(angles), ops.sin(angles)

    def rotate(self, x: Node, angles: tuple[Node, Node]) -> Node:
        """Turn the pairs (i, i + D/2) of (T, heads, 1, D)."""
        import numpy as np

        ops, half = self.ops, self.config.head_width // 2
        left, right = ops.variadic_split(x, ops.constant(np.int32(3)), self.integers(half, half)).outputs()
        turned = ops.concat([ops.multiply(right, self.number(-1)), left], -1)
        return ops.add(ops.multiply(x, angles[0]), ops.multiply(turned, angles[1]))

    def heads(self, x: Node, name: str, count: int, angles: tuple[Node, Node]) -> Node:
        """Queries or keys, normed if the model does that, at their positions: (T, 1, heads * D) -> (T, heads * D)."""
        ops, order = self.ops, self.integers(0, 2, 1, 3)
        x = ops.transpose(ops.reshape(x, self.integers(0, 1, count, self.config.head_width), True), order)
        if self.config.head_norm:
            x = self.norm(x, name, self.config.head_width)
        return ops.reshape(ops.transpose(self.rotate(x, angles), order), self.integers(0, -1), True)

    def attention(self, x: Node, layer: int, base: str, angles: tuple[Node, Node]) -> Node:
        import numpy as np

        ops, config = self.ops, self.config
        hidden, inner, width = config.hidden_size, config.heads * config.head_width, config.kv_heads * config.head_width
        parts = {f"{base}.q_proj": inner, f"{base}.k_proj": width, f"{base}.v_proj": width}
        q, k, v = self.linears(x, parts, hidden)
        q = self.heads(q, f"{base}.q_norm", config.heads, angles)
        k = self.heads(k, f"{base}.k_norm", config.kv_heads, angles)
        v = ops.reshape(v, self.integers(0, -1), True)
        caches = [self.input(f"{part}_cache.{layer}", [-1, -1, -1, -1], "dynamic") for part in ("key", "value")]
        window = ops.constant(np.int32(config.sliding_window if config.slides(layer) else 0))
        no_slopes = ops.constant(np.zeros(0, np.float32))
        unused = [ops.constant(np.zeros(shape, kind)) for kind, shape in UNUSED]
        arguments = [q, k, v, *caches, *self.sequences, self.number(config.score_scale), window, no_slopes,
                     self.longest, *unused]  # fmt: skip
        attended = self.openvino.op._PagedAttentionExtension([node.output(0) for node in arguments])
        facts = attended.get_rt_info()
        facts["num_k_heads"] = facts["num_v_heads"] = config.kv_heads
        facts["k_head_size"] = facts["v_head_size"] = config.head_width
        shaped = ops.reshape(attended.output(0), self.integers(0, 1, inner), True)
        return self.linear(shaped, f"{base}.o_proj", hidden, inner)

    def feed_forward(self, x: Node, base: str) -> Node:
        ops, hidden, inner = self.ops, self.config.hidden_size, self.config.feed_forward_size
        gate, up = self.linears(x, {f"{base}.gate_proj": inner, f"{base}.up_proj": inner}, hidden)
        gate = ops.swish(gate) if self.config.activation is Activation.silu else ops.gelu(gate, "tanh")
        return self.linear(ops.multiply(gate, up), f"{base}.down_proj", hidden, inner)

    def block(self, x: Node, layer: int, angles: tuple[Node, Node]) -> Node:
        """As `hasten.model.decoder.Block`."""
        ops, base = self.ops, f"model.layers.{layer}"

        def norm(values: Node, name: str) -> Node:
            return self.norm(values, f"{base}.{name}", self.config.hidden_size)

        attended = self.attention(norm(x, "input_layernorm"), layer, f"{base}.self_attn", angles)
        if self.config.post_norms:
            x = ops.add(x, norm(attended, "post_attention_layernorm"))
            gated = self.feed_forward(norm(x, "pre_feedforward_layernorm"), f"{base}.mlp")
            return ops.add(x, norm(gated, "post_feedforward_layernorm"))
        x = ops.add(x, attended)
        return ops.add(x, self.feed_forward(norm(x, "post_attention_layernorm"), f"{base}.mlp"))


def constant(q: Tensor, bits: int) -> Any:
    """Integers as a constant of type `i8` or `i4`: of two neighbours, the first in the lower half of a byte."""
    import torch

    openvino = runtime()
    if bits == 8:
        return openvino.op.Constant(q.contiguous().numpy())
    halves = torch.nn.functional.pad(q.flatten(), (0, q.numel() % 2)).view(torch.uint8) & 15
    packed = (halves[0::2] | (halves[1::2] << 4)).numpy()
    return openvino.op.Constant(
        openvino.Tensor(packed, openvino.Shape(list(q.shape)), openvino.Type.i4), shared_memory=False
    )


def checked(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`values`. Raises `UserError` if they are not of that shape or not finite."""
    if tuple(values.shape) != shape:
        raise UserError(f"{name} must have shape {shape} by config.json, got {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise UserError(f"{name} holds NaN or infinite values")
    return values
