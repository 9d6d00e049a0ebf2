"""Variants that several tests want, each made once, with their networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hasten.artifacts import Variant
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared.quantiser import Scale
from hasten.model.huggingface import load_network
from hasten.model.network import Network
from tests.engine import llama

SHAPES = {
    **llama.CASES,
    "mistral-slides": llama.shape(sliding_window=8, head_size=24),
    "mistral-slides-wide": llama.shape(sliding_window=8, head_size=32),  # for those that want heads of 16
    "gemma3-short": llama.gemma("SF", head_size=32),
}


@dataclass
class Shelf:
    """Read only: a test that changes a variant makes its own."""

    folder: Path
    _variants: dict[str, Variant] = field(default_factory=dict)
    _networks: dict[Path, Network] = field(default_factory=dict)

    def variant(self, name: str, bits: int = 0, group_size: int = 0) -> Variant:
        """One of SHAPES, in float or (bits above 0) on a grid, with scales of either sign."""
        key = f"{name}-int{bits}-{group_size}" if bits else name
        if key not in self._variants:
            target = self.folder / key
            if bits:
                method = Rtn(bits=bits, group_size=group_size, scale=Scale.signed)
                self._variants[key] = make_variant(method, self.variant(name), None, name=key, target=target, seed=0)[0]
            else:
                self._variants[key] = llama.variant(target, SHAPES[name])
        return self._variants[key]

    def broken(self) -> Variant:
        """A Llama whose logits are not finite."""
        if "broken" not in self._variants:
            tensors = llama.random_tensors(llama.shape())
            tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
            self._variants["broken"] = llama.variant(self.folder / "broken", llama.shape(), tensors)
        return self._variants["broken"]

    def network(self, variant: Variant) -> Network:
        """The one that it is, in float32."""
        if variant.path not in self._networks:
            self._networks[variant.path] = load_network(variant).eval()
        return self._networks[variant.path]
