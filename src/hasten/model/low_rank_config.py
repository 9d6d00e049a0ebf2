"""The shape of a decoder some of whose matrices are two thin ones: its family's fields, and a rank for each of those.

    W (out, in)  ~  out_proj (out, rank) in_proj (rank, in)

No library knows such a network, and one that took it for its family's would fill what it misses with random numbers.
So its `config.json` has a `model_type` of its own, `hasten_low_rank`; `base_model_type` is the family's. It needs no
torch; the module is `hasten.model.factored`, the method that makes it `hasten.compression.low_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.model.config import ModelConfig
from hasten.model.config_json import from_huggingface, to_huggingface

MODEL_TYPE = "hasten_low_rank"


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """A block's matrices by name in the order of the data, each (out, in)."""
    hidden, inner = config.hidden_size, config.feed_forward_size
    query, key = config.heads * config.head_width, config.kv_heads * config.head_width
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def matrix_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every block's, by their names in a checkpoint: `model.layers.0.self_attn.q_proj`."""
    block = projections(config).items()
    return {f"model.layers.{layer}.{name}": size for layer in range(config.layers) for name, size in block}


@dataclass
class LowRankConfig(ModelConfig):
    """ranks: of each matrix that is two, by its name in the checkpoint (`model.layers.0.self_attn.q_proj`)."""

    ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = matrix_sizes(self)
        for name, rank in self.ranks.items():
            if name not in sizes:
                raise UserError(f"model.ranks must name matrices of the blocks, got {name!r}")
            most = min(sizes[name])
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
                raise UserError(f"model.ranks must be 1 to {most} for {name}, got {rank!r}")


def ranks(config: ModelConfig) -> dict[str, int]:
    """Of a decoder's factored matrices, by name: none, if all are whole."""
    return config.ranks if isinstance(config, LowRankConfig) else {}


def factored_json(config: Json, ranks: dict[str, int]) -> Json:
    """A family's `config.json` with those of its matrices in two."""
    own = {"architectures": ["LowRank"], "model_type": MODEL_TYPE, "base_model_type": config["model_type"]}
    return {**config, **own, "ranks": ranks}


def to_json(shape: LowRankConfig, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Json:
    """`config.json` of a checkpoint with this shape."""
    return factored_json(to_huggingface(shape, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id), shape.ranks)


def decoder_shape(config: Json) -> ModelConfig:
    """A decoder's shape, its matrices whole or not. Raises `UserError` for another network."""
    return from_json(config) if config.get("model_type") == MODEL_TYPE else from_huggingface(config)


def from_json(config: Json) -> LowRankConfig:
    """The shape in a `config.json` of that model type. Raises `UserError` for what is missing or makes no sense."""
    base, ranks = from_huggingface({**config, "model_type": config.get("base_model_type")}), config.get("ranks")
    if not isinstance(ranks, dict) or not ranks:
        raise UserError(f"config.json: ranks must be an object with a rank for each factored matrix, got {ranks!r}")
    return LowRankConfig(**{one.name: getattr(base, one.name) for one in fields(base)}, ranks=ranks)
