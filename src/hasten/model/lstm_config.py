"""The shape of the LSTM encoder-decoder, as a config (`conf/model/lstm.yaml`) and as a `config.json`; without torch.

No library knows this architecture, so its `config.json` has a `model_type` of its own, `hasten_lstm`; what its
fields share with a decoder's is called by the same names.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.model.recipe import ModelRecipe

MODEL_TYPE = "hasten_lstm"
WHOLE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "embedding_size": "embedding_size",
    "num_hidden_layers": "layers",
    "max_position_embeddings": "context",
}
"""Fields of a `config.json` that are whole numbers, and ours."""


@dataclass
class LstmConfig(ModelRecipe):
    """An LSTM encoder and an LSTM decoder of the same shape.

    layers: of each of the two. hidden_size: width of a layer's state. embedding_size: 0 means hidden_size. vocab_size:
    0 means the tokenizer's. context: the longest sequence the model is meant for (its memory does not grow with it).
    tied_head: the output matrix is the embedding. initializer_range: spread of the embedding before training.
    """

    layers: int = 1
    hidden_size: int = 256
    embedding_size: int = 0
    vocab_size: int = 0
    context: int = 512
    tied_head: bool = True
    initializer_range: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("hidden_size", 1), ("context", 2)):
            if getattr(self, name) < least:
                raise UserError(f"model.{name} must be at least {least}, got {getattr(self, name)}")
        if self.embedding_size < 0:
            raise UserError(f"model.embedding_size must be 0 (hidden_size) or more, got {self.embedding_size}")
        if self.tied_head and self.input_width != self.hidden_size:
            raise UserError(
                f"model.embedding_size must be 0 or model.hidden_size ({self.hidden_size}) where model.tied_head is "
                f"true, got {self.embedding_size}"
            )
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size must be 0 (the tokenizer's) or more, got {self.vocab_size}")
        if not 0 <= self.initializer_range < float("inf"):
            raise UserError(f"model.initializer_range must be 0 or more and finite, got {self.initializer_range}")

    @property
    def input_width(self) -> int:
        """Width of an embedding."""
        return self.embedding_size or self.hidden_size

    @property
    def widest(self) -> int:
        """The most values that a token has at one time below the head: its four gates."""
        return 4 * self.hidden_size


def to_json(config: LstmConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Json:
    """`config.json` of a checkpoint with this shape."""
    return {
        "architectures": ["Lstm"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for theirs, ours in WHOLE.items()},
        "embedding_size": config.input_width,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": "float32",
    }


def from_json(config: Json) -> LstmConfig:
    """The shape in a `config.json` of that model type. Raises `UserError` for what is missing or makes no sense."""
    sizes = {}
    for theirs, ours in WHOLE.items():
        value = config.get(theirs)
        if value is None:
            raise UserError(f"config.json lacks {theirs}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise UserError(f"config.json: {theirs} must be a whole number from 0 to {2**31 - 1}, got {value!r}")
        sizes[ours] = value
    tied, spread = config.get("tie_word_embeddings", True), config.get("initializer_range", 0.1)
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings must be true or false, got {tied!r}")
    if isinstance(spread, bool) or not isinstance(spread, int | float):
        raise UserError(f"config.json: initializer_range must be a number, got {spread!r}")
    return LstmConfig(**sizes, tied_head=tied, initializer_range=float(spread))
