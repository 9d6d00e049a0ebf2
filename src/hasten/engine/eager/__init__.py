"""The reference engine: our own network in plain PyTorch, with a KV cache (an LSTM: with the memory it carries).

It is what every other engine's answers are compared with, and the honest float baseline: no
compiler, no graph, one Python call per operation, so at batch 1 a small model's decode is bound by
that overhead rather than by memory. A quantised variant is dequantised to `weight_dtype` when it is
loaded: right for comparing answers, labelled as such, and never a candidate for speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hasten.artifacts import Variant
from hasten.engine.base import Dtype, Engine, Request, Session, Support, Token
from hasten.engine.sampling import probabilities
from hasten.engine.torch_options import check_device, check_follows, prepare
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.network import Network


@dataclass
class Eager(Engine):
    """activation_dtype auto follows weight_dtype, kv_cache_dtype auto follows the activations."""

    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self)
        check_follows(self, self.weights, "activation_dtype")

    @property
    def weights(self) -> Dtype:
        """The weights' type with `auto` resolved."""
        return Dtype.float32 if self.weight_dtype is Dtype.auto else self.weight_dtype

    @property
    def kv_cache(self) -> Dtype:
        """The KV cache's type with `auto` resolved."""
        return self.weights if self.kv_cache_dtype is Dtype.auto else self.kv_cache_dtype

    def supports(self, variant: Variant) -> Support:
        from hasten.model.grid import grid_of
        from hasten.model.shape import read_shape

        try:
            read_shape(variant.config)
            grid = grid_of(variant)
        except UserError as error:
            return Support(reason=str(error))
        if grid:
            return Support(native_format=f"{self.weights.name} (dequantised)", native=False)
        return Support(native_format=self.weights.name)

    def load(self, variant: Variant, cache: Path) -> EagerSession:
        import torch

        from hasten.model.huggingface import load_network

        prepare(self)
        start = time.perf_counter()
        model = load_network(variant, getattr(torch, self.weights.name)).eval().to(self.devices[0])
        session = EagerSession(self, model, str(self.supports(variant).native_format))
        session.load_seconds = time.perf_counter() - start
        return session


class EagerSession(Session):
    """One request at a time; its state is allocated once and overwritten by the next request."""

    def __init__(self, engine: Eager, model: Network, kernel: str) -> None:
        import torch

        from hasten.model.cost import cost_of

        self.model = model
        self.kernel = kernel
        size = getattr(torch, engine.weights.name).itemsize
        kv_dtype = getattr(torch, engine.kv_cache.name)
        cost = cost_of(model.config)
        self.weight_bytes_per_token = cost.parameters_per_token * size
        self.kv_bytes_per_position = cost.kv_bytes(2, kv_dtype.itemsize) - cost.kv_bytes(1, kv_dtype.itemsize)
        self.arithmetic = engine.weights.name
        self.context = engine.max_context
        self.cache = model.new_state(1, self.context, kv_dtype, engine.devices[0])

    def submit(self, request: Request) -> Iterator[Token]:
        request.check(self.context, self.model.config.vocab_size)
        return self._tokens(request)

    def _tokens(self, request: Request) -> Iterator[Token]:
        import torch

        sent = time.perf_counter()
        self.cache.clear()
        device = self.model.lm_head.weight.device
        ids = torch.tensor([request.prompt], device=device)  # (1, T)
        generator = torch.Generator().manual_seed(request.seed)
        for count in range(request.max_tokens):
            with torch.inference_mode():
                logits = self.model(ids, self.cache)[0, -1]  # (vocabulary,)
                token = int(logits.argmax())
                if not torch.isfinite(logits[token]):
                    raise RuntimeError(f"request {request.id}: the logits are not finite after {count} tokens")
                if request.temperature:
                    shares = probabilities(logits.cpu(), request.temperature, request.top_p)
                    token = int(torch.multinomial(shares, 1, generator=generator))
            ids = torch.tensor([[token]], device=device)
            yield Token(request.id, token, time.perf_counter() - sent)
            if token in request.stop:
                return

    def memory(self) -> dict[str, int | None]:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return {"weights": weights, "kv_cache": self.cache.bytes}

    def close(self) -> None:
        del self.model, self.cache
