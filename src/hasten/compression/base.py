"""What a compression method is: parent checkpoint in, variant out, deterministic."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.artifacts import Checkpoint, Json, Variant, load_checkpoint
from hasten.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from hasten.model.decoder import Decoder
    from hasten.model.grid import Grid, Grids


@dataclass
class Calibration:
    """Rows of the training split that a method may look at, N of T tokens.

    ids: (N, T) int64. documents: (N, T) int32, which of its row's documents a token is of, -1 for padding; they do not
    attend to each other. weights: (N, T) float32, 1 where predicting a token counts: of text every token but a
    document's first, of a task item its completion. source: what it is, in words. counts: (vocabulary,) int64, instead
    of rows for methods that need "counts": how often each id comes up in all text and items.
    """

    ids: torch.Tensor
    documents: torch.Tensor
    weights: torch.Tensor
    source: str = ""
    counts: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int((self.documents >= 0).sum() if self.counts is None else self.counts.sum())

    @property
    def hash(self) -> str:
        """sha256 (hex) of the ids and of what counts."""
        total = hashlib.sha256()
        for values in (self.ids, self.documents, self.weights, *([] if self.counts is None else [self.counts])):
            total.update(f"{tuple(values.shape)} {values.dtype}\n".encode())
            total.update(values.contiguous().numpy().tobytes())
        return total.hexdigest()


@dataclass
class Compressed:
    """What a method hands back: the model's config and tensors, and what it did.

    grid: the grid of its integers, or of each matrix, or None if the weights stay float. notes: facts for the manifest
    (deterministic: scores, dropped layers), no timings. files: JSON files that it has instead of its parent's, by name
    (`tokenizer.json`); None for one that it shall not have. cost: figures of making it beside time and memory
    (`build_steps`, `build_tokens`). curves: (step, value) by name, of methods that train.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    grid: Grid | Grids | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Json | None] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass
class Compressor(ABC):
    """Options live in the subclass; `needs` says what the method has to be given."""

    needs: ClassVar[str] = "nothing"
    """`nothing`, `counts` (how often each token comes up), `calibration` (looks at activations or gradients) or
    `training` (takes steps on it)."""
    grids: ClassVar[str] = "keeps its parent's"
    """Which grids the method lands on, in words, for the docs."""
    takes_factors: ClassVar[bool] = False
    """Whether the network may have factored matrices (`low_rank`)."""

    @property
    def name(self) -> str:
        """The method's one name: its file, its YAML, its tag."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def compress(self, parent: Checkpoint, calibration: Calibration | None, seed: int) -> Compressed:
        """Make the variant. Raises `UserError` if the method makes no sense on this parent."""

    def network(self, parent: Checkpoint) -> Decoder:
        """The parent as a decoder in float32.

        Raises `UserError` if it is another network, or quantised, or has factors that the method does not take.
        """
        from hasten.model.config import ModelConfig
        from hasten.model.config_json import FAMILIES
        from hasten.model.decoder import Decoder
        from hasten.model.huggingface import load_network
        from hasten.model.low_rank_config import LowRankConfig
        from hasten.model.shape import read_shape

        shape = read_shape(parent.config)
        if not isinstance(shape, ModelConfig):
            kind, families = parent.config["model_type"], ", ".join(FAMILIES)
            raise UserError(f"{self.name} is for decoders ({families}), got model_type {kind!r}")
        self.refuse_quantised(parent)
        if isinstance(shape, LowRankConfig) and not self.takes_factors:
            raise UserError(
                f"{self.name} needs whole matrices, got {parent.path} with factored ones; low_rank after it"
            )
        model = load_network(parent, own=True)
        assert isinstance(model, Decoder)
        return model.eval()

    def refuse_quantised(self, parent: Checkpoint) -> None:
        """Raises `UserError` if the parent lies on a grid."""
        if parent.manifest.get("grid"):
            raise UserError(f"{self.name} needs a float parent, got {parent.path} which is quantised; quantise last")

    def given(self, calibration: Calibration | None) -> Calibration:
        """Raises `UserError` if there is none."""
        if calibration is None:
            raise UserError(f"{self.name} needs calibration text, got none")
        return calibration


def ancestor(parent: Checkpoint, name: str, field: str) -> Checkpoint:
    """The variant of that name among a parent's ancestors or itself; variants lie side by side.

    field: the option that names it. Raises `UserError` if it is no ancestor.
    """
    lineage = parent.lineage if isinstance(parent, Variant) else []
    if name not in lineage:
        raise UserError(f"{field} must be one of the parent's lineage ({', '.join(lineage) or 'none'}), got {name!r}")
    return load_checkpoint(parent.path.parent / name)


def like_parent(model: Decoder, parent: Checkpoint) -> dict[str, torch.Tensor]:
    """A changed network's tensors, each in the type in which the parent stores it. The network gives its weights up, so
    that they are not in memory in both types.
    """
    from hasten.model.huggingface import network_tensors

    types = {name: value.dtype for name, value in parent.tensors().items()}
    left = network_tensors(model)
    model.to("meta")
    return {name: value.to(types.get(name, value.dtype)) for name, value in popped(left)}


def popped(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A dictionary's items, each taken out of it as its turn comes."""
    for name in list(tensors):
        yield name, tensors.pop(name)
