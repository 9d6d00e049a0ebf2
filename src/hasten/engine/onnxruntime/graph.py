"""A checkpoint as an ONNX graph, written by hand: the operators that ONNX Runtime has kernels of its own for.

Per block: an RMSNorm that adds to the residual stream on its way (SkipSimplifiedLayerNormalization), one product for
queries, keys and values, attention that turns them, extends the KV cache in place and attends (GroupQueryAttention),
one product back, and a gated feed-forward. Nothing is left for an optimiser to fuse. Only the last position goes
through the head. Angles come in as inputs, computed by our own network's code, and so does the KV cache:
past and present are the same memory.

Weights lie beside the graph, one after the other in `weights.bin`. Shapes: B sequences, T new tokens of each, S the
longest context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.artifacts import Json
from hasten.engine.onnxruntime.blocks import block_size, packed, scales
from hasten.errors import UserError
from hasten.model.config import Activation, ModelConfig
from hasten.model.grid import Grid, Grids, integers

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

FORMAT = 1
"""Part of the cache key: raise it when the same variant would be written as another graph."""
MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 21, 10
ALIGNED = 4096
"""A page: tensors are mapped into memory."""
INT8_ACTIVATIONS, FLOAT_ACTIVATIONS = 4, 1
"""`accuracy_level` of MatMulNBits."""

Kind = tuple[int, list[int | str]]
"""An input's or output's element type (`onnx.TensorProto`) and shape."""


class Graph:
    """Nodes as they are added, and their weights in a file. tensors: as stored; grid: theirs, if any are integers."""

    def __init__(
        self, tensors: dict[str, Tensor], grid: Grid | Grids | None, accuracy_level: int, folder: Path
    ) -> None:
        self.tensors, self.grid, self.accuracy_level, self.folder = tensors, grid, accuracy_level, folder
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: dict[str, onnx.TensorProto] = {}
        self.file = (folder / "weights.bin").open("wb")
        self.bytes, self.dequantised_bytes = 0, 0
        """Of the weights that every token reads whole, as the kernels hold them, and as they expand them in a pass."""

    def node(self, operator: str, *inputs: str, also: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        """Add an operator; the name of its first output. also: names of further ones. What is left out has no name."""
        from onnx import helper

        name = f"{operator}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name, *also], name, domain=domain, **attributes))
        return name

    def tensor(self, name: str, values: Tensor) -> str:
        """Write a tensor behind those before it; its name."""
        import onnx

        proto = onnx.TensorProto(name=name, dims=values.shape, data_location=onnx.TensorProto.EXTERNAL)
        proto.data_type = onnx.TensorProto.UINT8 if values.dtype is torch.uint8 else onnx.TensorProto.FLOAT
        self.file.write(b"\0" * (-self.file.tell() % ALIGNED))
        place = {"location": "weights.bin", "offset": self.file.tell(), "length": values.nbytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.file.write(values.contiguous().flatten().view(torch.uint8).numpy().data)
        self.initialisers[name] = proto
        return name

    def constant(self, name: str, value: float | list[int]) -> str:
        """A number or a shape, within the graph; its name."""
        from onnx import numpy_helper

        self.initialisers[name] = numpy_helper.from_array(torch.tensor(value).numpy(), name)
        return name

    def vector(self, name: str, offset: float = 0.0) -> str:
        """A norm's weight or a bias."""
        values = self.floats(name) + offset
        self.bytes += values.nbytes
        return self.tensor(name, values)

    def floats(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def alike(self, *sources: str) -> bool:
        """Whether matrices lie on one grid, or are all floats."""
        grid, stored = self.grid, {f"{source}.weight_packed" in self.tensors for source in sources}
        return len(stored) == 1 and (grid is None or not stored.pop() or len({*map(grid.of, sources)}) == 1)

    def linear(self, x: str, *sources: str) -> str:
        """x (..., in) times matrices of the same input, below each other, plus their biases: (..., out).

        Those that are two, or beside such, are products of their own.
        """
        if any(self.factored(source) for source in sources):
            parts = [self.product(x, source) for source in sources]
            return self.node("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]
        name = "+".join(sources)
        biases = [self.floats(f"{s}.bias") for s in sources if f"{s}.bias" in self.tensors]
        bias = self.tensor(f"{name}.bias", torch.cat(biases)) if biases else ""
        self.bytes += sum(one.nbytes for one in biases)
        if all(f"{s}.weight_packed" in self.tensors for s in sources):
            return self.quantised(x, name, bias, sources)
        weight = torch.cat([self.floats(f"{s}.weight") for s in sources]).T
        self.bytes += weight.nbytes
        y = self.node("MatMul", x, self.tensor(f"{name}.weight", weight))
        return self.node("Add", y, bias) if bias else y

    def factored(self, source: str) -> bool:
        return any(f"{source}.in_proj.{kind}" in self.tensors for kind in ("weight", "weight_packed"))

    def product(self, x: str, source: str) -> str:
        """x times a matrix, or times the two that it is."""
        if not self.factored(source):
            return self.linear(x, source)
        return self.linear(self.linear(x, f"{source}.in_proj"), f"{source}.out_proj")

    def quantised(self, x: str, name: str, bias: str, sources: tuple[str, ...]) -> str:
        if self.grid is None:
            raise UserError("the checkpoint stores integers but its manifest declares no grid")
        parts = [integers(self.tensors, source, self.grid) for source in sources]
        q, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        (rows, columns), grid = q.shape, self.grid.of(sources[0])
        block = block_size(grid.group_size, columns)
        weight, by_block = packed(q, grid.bits, block), scales(scale, columns, block)
        self.bytes += weight.nbytes + by_block.nbytes
        if self.accuracy_level == INT8_ACTIVATIONS:
            self.bytes += by_block.nbytes  # of each block the sum, too, which takes the zero point out again
        elif grid.bits == 8:
            self.dequantised_bytes += 4 * q.numel()  # there is no kernel for it
        inputs = [x, self.tensor(f"{name}.weight", weight), self.tensor(f"{name}.scales", by_block)]
        return self.node("MatMulNBits", *inputs, *(("", "", bias) if bias else ()), domain=MICROSOFT, N=rows, K=columns,
                        bits=grid.bits, block_size=block, accuracy_level=self.accuracy_level)  # fmt: skip

    def save(self, inputs: dict[str, Kind], outputs: dict[str, Kind]) -> None:
        """`model.onnx` beside the weights, which are all there."""
        import onnx
        from onnx import helper

        self.file.close()
        ends = [[helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
                for kinds in (inputs, outputs)]  # fmt: skip
        graph = helper.make_graph(self.nodes, "hasten", *ends, initializer=list(self.initialisers.values()))
        sets = [helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (MICROSOFT, 1))]
        onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=IR_VERSION), self.folder / "model.onnx")


class Layers:
    """The nodes of a decoder. `x` is the residual stream, what `added` holds is still to be added to it."""

    def __init__(self, graph: Graph, config: ModelConfig) -> None:
        self.graph, self.config = graph, config

    def norm(self, x: str, name: str, added: str = "") -> tuple[str, str]:
        """x + added, and that normalised by `name`: (normed, sum)."""
        weight = self.graph.vector(f"{name}.weight", 1.0 if self.config.offset_norms else 0.0)
        epsilon = self.config.norm_epsilon
        if not added:
            return self.graph.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon), x
        total = f"{name}.sum"
        return self.graph.node("SkipSimplifiedLayerNormalization", x, added, weight, also=("", "", total),
                               domain=MICROSOFT, epsilon=epsilon), total  # fmt: skip

    def post_norm(self, x: str, name: str) -> str:
        return self.norm(x, name)[0] if self.config.post_norms else x

    def block(self, layer: int, x: str, added: str) -> tuple[str, str]:
        base = f"model.layers.{layer}"
        second = "pre_feedforward_layernorm" if self.config.post_norms else "post_attention_layernorm"
        normed, x = self.norm(x, f"{base}.input_layernorm", added)
        attended = self.post_norm(self.attention(layer, normed), f"{base}.post_attention_layernorm")
        normed, x = self.norm(x, f"{base}.{second}", attended)
        return x, self.post_norm(self.feed_forward(f"{base}.mlp", normed), f"{base}.post_feedforward_layernorm")

    def attention(self, layer: int, x: str) -> str:
        config, base = self.config, f"model.layers.{layer}.self_attn"
        parts = [f"{base}.{part}_proj" for part in "qkv"]
        if config.head_norm or not self.graph.alike(*parts):
            q, k, v = (self.graph.linear(x, part) for part in parts)
            if config.head_norm:
                q, k = self.head_norm(q, f"{base}.q_norm"), self.head_norm(k, f"{base}.k_norm")
        else:
            q, k, v = self.graph.linear(x, *parts), "", ""
        local = "local_" if config.slides(layer) and config.local_rope_theta else ""
        past, present = ([f"{when}_{part}.{layer}" for part in ("key", "value")] for when in ("past", "present"))
        y = self.graph.node(
            "GroupQueryAttention", q, k, v, *past, "last", "total", f"{local}cos", f"{local}sin", also=present,
            domain=MICROSOFT, num_heads=config.heads, kv_num_heads=config.kv_heads, scale=config.score_scale,
            do_rotary=1, local_window_size=config.sliding_window if config.slides(layer) else -1,
        )  # fmt: skip
        return self.graph.linear(y, f"{base}.o_proj")

    def head_norm(self, x: str, name: str) -> str:
        """(B, T, heads * D), each head normalised."""
        split = self.graph.constant("split", [0, 0, -1, self.config.head_width])
        heads = self.graph.node("Reshape", x, split)
        return self.graph.node("Reshape", self.norm(heads, name)[0], self.graph.constant("joined", [0, 0, -1]))

    def feed_forward(self, base: str, x: str) -> str:
        gate, up = (self.graph.linear(x, f"{base}.{part}_proj") for part in ("gate", "up"))
        if self.config.activation is Activation.silu:
            gate = self.graph.node("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # x * sigmoid(x)
        else:
            gate = self.graph.node("Gelu", gate, approximate="tanh")
        return self.graph.linear(self.graph.node("Mul", gate, up), f"{base}.down_proj")

    def embedded(self) -> str:
        name = "model.embed_tokens.weight"
        x = self.graph.node("Gather", self.graph.tensor(name, self.graph.floats(name)), "ids")
        if self.config.embedding_scale:
            x = self.graph.node("Mul", x, self.graph.constant("embedding_scale", self.config.hidden_size**0.5))
        return x

    def head(self, x: str, added: str) -> str:
        """Logits of the last position, (B, vocabulary): a matrix of its own, or the embedding as it lies."""
        graph, last = self.graph, self.graph.constant("newest", -1)
        x, added = (graph.node("Gather", value, last, axis=1) for value in (x, added))
        normed, _ = self.norm(x, "model.norm", added)
        if "lm_head.weight_packed" in graph.tensors or "lm_head.weight" in graph.tensors:
            return graph.linear(normed, "lm_head")
        graph.bytes += 4 * self.config.vocab_size * self.config.hidden_size  # the kernel has a copy of its own
        return graph.node("Gemm", normed, "model.embed_tokens.weight", transB=1)


def write(
    config: ModelConfig, tensors: dict[str, Tensor], grid: Grid | Grids | None, accuracy_level: int, folder: Path
) -> Json:
    """`model.onnx` and `weights.bin` in `folder`; how many bytes of weights are held, and how many a token reads."""
    from onnx import TensorProto

    graph = Graph(tensors, grid, accuracy_level, folder)
    layers = Layers(graph, config)
    x, added = layers.embedded(), ""
    for layer in range(config.layers):
        x, added = layers.block(layer, x, added)
    layers.head(x, added)
    graph.nodes[-1].output[0] = "logits"
    cache: Kind = (TensorProto.FLOAT, ["B", config.kv_heads, "S", config.head_width])
    angles: Kind = (TensorProto.FLOAT, ["S", config.head_width // 2])
    local = ("local_cos", "local_sin") if config.sliding_layers and config.local_rope_theta else ()
    caches = [f"{part}.{layer}" for layer in range(config.layers) for part in ("key", "value")]
    inputs: dict[str, Kind] = {
        "ids": (TensorProto.INT64, ["B", "T"]), "last": (TensorProto.INT32, ["B"]), "total": (TensorProto.INT32, []),
        **dict.fromkeys(("cos", "sin", *local), angles), **{f"past_{name}": cache for name in caches},
    }  # fmt: skip
    logits: Kind = (TensorProto.FLOAT, ["B", config.vocab_size])
    graph.save(inputs, {"logits": logits, **{f"present_{name}": cache for name in caches}})
    row = 4 * config.hidden_size
    return {
        "weight_bytes": graph.bytes + config.vocab_size * row,
        "weight_bytes_per_token": graph.bytes + graph.dequantised_bytes + row,
    }
