"""Which network a `config.json` describes, and building it: the one place that knows all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.artifacts import Json
from hasten.model import low_rank_config, lstm_config
from hasten.model.config import ModelConfig
from hasten.model.config_json import to_huggingface
from hasten.model.low_rank_config import LowRankConfig
from hasten.model.lstm_config import LstmConfig

if TYPE_CHECKING:
    from hasten.model.network import Network

Shape = ModelConfig | LstmConfig


def read_shape(config: Json) -> Shape:
    """The shape in a `config.json`. Raises `UserError` for an architecture that is not covered."""
    if config.get("model_type") == lstm_config.MODEL_TYPE:
        return lstm_config.from_json(config)
    return low_rank_config.decoder_shape(config)


def write_shape(shape: Shape, *, bos_id: int | None, eos_id: int | None, pad_id: int | None) -> Json:
    """`config.json` of a checkpoint with this shape."""
    if isinstance(shape, LstmConfig):
        return lstm_config.to_json(shape, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
    if isinstance(shape, LowRankConfig):
        return low_rank_config.to_json(shape, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
    return to_huggingface(shape, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


def build(shape: Shape) -> Network:
    """A network of that shape, weights not yet set."""
    if isinstance(shape, LstmConfig):
        from hasten.model.lstm import Lstm

        return Lstm(shape)
    if isinstance(shape, LowRankConfig):
        from hasten.model.factored import factored

        return factored(shape)
    from hasten.model.decoder import Decoder

    return Decoder(shape)


def outline(shape: Shape) -> Network:
    """A network of that shape, its tensors on torch's meta device: their names and sizes, and no memory.

    Its modules set their weights as they are made, which means nothing there but loads torch's symbolic half (sympy and
    the compiler: 2 s and 72 MB, torch 2.13). So that is left out.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Unset(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if getattr(function, "__module__", "") == "torch.nn.init":
                return given["tensor"] if "tensor" in given else args[0]
            return function(*args, **given)

    with torch.device("meta"), Unset():
        return build(shape)
