"""A variant in memory, as the native kernels know it: its weights on huge pages, its shape, its tables of angles."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from hasten.artifacts import Json, Variant, read_json
from hasten.engine.base import Dtype
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.engine.native import Native
    from hasten.engine.native.layout import Matrix, Shape
    from hasten.model.config import ModelConfig

FLOATS, INTEGERS = 0, 2
"""Activations as they are, or in the form that a matrix is multiplied with fastest (`Precision` of cpp/kernels.hpp)."""
KEPT = (Dtype.float32, Dtype.float16, Dtype.int8)
"""What keys and values may be kept in (`Kept` of cpp/cache.hpp)."""


class Loaded:
    """What the kernels run. folder: where `Native.build` put the weights. guesses: checked in a pass."""

    def __init__(self, engine: Native, variant: Variant, folder: Path, guesses: int = 0) -> None:
        from hasten.model.config_json import from_huggingface

        self.config = from_huggingface(variant.config)
        self.context = min(engine.max_context, self.config.context)
        places = read_json(folder / "manifest.json")["places"]
        self._arena = Arena(folder / "weights.bin")
        self.shape, self._kept = shape_of(engine, self.config, self.context, guesses, places, self._arena)
        sizes = {name: entry.get("bytes", 0) for name, entry in places.items()}
        rows = self.config.vocab_size
        self.weight_bytes = sum(sizes.values())
        self.kv_bytes_per_position = kv_bytes_per_position(self.config, engine.kv_cache)
        self.weight_bytes_per_token = self.weight_bytes - sizes.get("embedding", 0) * (rows - 1) // rows


def kv_bytes_per_position(config: ModelConfig, kept: Dtype) -> int:
    """Of all layers, as cpp/cache.hpp lays them out: values fill whole vectors, integers have scales beside them."""
    from hasten.engine.native.layout import LANES, STRETCH, padded

    width, filled = config.head_width, padded(config.head_width, LANES)
    if kept is Dtype.int8:
        scales = 4 * (padded(width, STRETCH) // STRETCH + 1)
        head = padded(width, 4) + filled + scales
    else:
        head = (width + filled) * (4 if kept is Dtype.float32 else 2)
    return config.layers * config.kv_heads * head


class Arena:
    """The weights in memory, on huge pages where the system has them: fewer translations, more bandwidth."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        # private: shared memory, Python's default, gets no huge pages
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        with path.open("rb") as file:
            read = file.readinto(self.memory)
        if read != size:
            raise UserError(f"{path} could not be read to its end")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def at(self, place: int | None) -> int | None:
        return None if place is None else self.address + place

    def matrix(self, entry: Json) -> Matrix:
        from hasten.engine.native.layout import Matrix

        numbers = {name: entry[name] for name in ("kind", "rows", "columns", "group")}
        return Matrix(**numbers, **{part: self.at(entry[part]) for part in ("data", "scales", "bias")})


def shape_of(
    engine: Native, config: ModelConfig, context: int, guesses: int, places: Json, arena: Arena
) -> tuple[Shape, list[object]]:
    """The model as the kernels know it, and what must outlive them."""
    import torch

    from hasten.engine.native.layout import MATRICES, NORMS, Layer, Shape, padded
    from hasten.model.config import Activation, RopeScaling
    from hasten.model.decoder import frequencies, rotary

    kept: list[object] = []
    layers = (Layer * config.layers)()
    for number in range(config.layers):
        layer = layers[number]
        for name in MATRICES:
            setattr(layer, name, arena.matrix(places[f"{number}.{name}"]))
        for name in NORMS:
            setattr(layer, name, arena.at(places.get(f"{number}.{name}", {}).get("data")))
        layer.window = config.sliding_window if config.slides(number) else 0
        layer.rope = int(config.slides(number) and config.local_rope_theta > 0)
    local = (config.local_rope_theta or config.rope_theta, RopeScaling())
    shape = Shape(
        layers=config.layers, hidden=config.hidden_size, heads=config.heads, kv_heads=config.kv_heads,
        width=config.head_width, feed=config.feed_forward_size, vocabulary=config.vocab_size,
        context=padded(context, 16), slots=engine.slots, batch=engine.micro_batch, threads=engine.thread_count,
        guesses=guesses, gelu=config.activation is Activation.gelu_tanh,
        precision=FLOATS if engine.activation_dtype is Dtype.float32 else INTEGERS,
        kept=KEPT.index(engine.kv_cache), epsilon=config.norm_epsilon, scale=config.score_scale,
        embedding_scale=config.hidden_size**0.5 if config.embedding_scale else 1.0, layer=layers,
        embedding=arena.matrix(places.get("embedding") or places["head"]), head=arena.matrix(places["head"]),
        norm=arena.at(places["norm"]["data"]),
    )  # fmt: skip
    for number, (theta, scaling) in enumerate(((config.rope_theta, config.rope_scaling), local)):
        angles = rotary(torch.arange(context), frequencies(config.head_width, theta, scaling))
        tables = [table[:, : config.head_width // 2].contiguous() for table in angles]  # the halves share angles
        shape.cosines[number], shape.sines[number] = (table.data_ptr() for table in tables)
        kept += tables
    return shape, [*kept, layers]
