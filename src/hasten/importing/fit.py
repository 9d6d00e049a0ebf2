"""Whether a checkpoint's tensors are those its `config.json` asks for: names and shapes, before any value is read."""

from __future__ import annotations

from hasten.artifacts import Json
from hasten.errors import UserError
from hasten.importing.weights import Stored, shown
from hasten.model.config import ModelConfig
from hasten.model.config_json import FAMILIES, check_family, from_huggingface

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Shapes = dict[str, tuple[int, ...]]


def check_config(config: Json) -> None:
    """Raises `UserError` for a checkpoint that is no plain one of a covered architecture."""
    if config.get("auto_map"):
        raise UserError(
            "config.json: auto_map names code of the checkpoint's own, which is never run; covered are the "
            f"architectures {', '.join(FAMILIES)}"
        )
    check_family(config)
    if config.get("quantization_config"):
        given = config["quantization_config"]
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise UserError(
            f"config.json: quantization_config must be absent, got {method!r}; import the float checkpoint and "
            "quantise it here"
        )


def fitting_shape(config: Json, stored: dict[str, Stored]) -> ModelConfig:
    """The shape in `config.json`. Raises `UserError` if the tensors are not those of that shape.

    A head that is stored although it is tied counts as tied here: whether it differs, only its values say.
    """
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(stored):  # before as many are built
        raise UserError(f"config.json: num_hidden_layers is {layers}, the weights hold {len(stored)} tensors in all")
    shape = from_huggingface(config)
    expected = expected_shapes(shape)
    optional = {HEAD: expected[EMBEDDING]} if shape.tied_head else {}
    if absent := expected.keys() - stored.keys():
        raise UserError(f"the weights lack {shown(absent)}, which config.json asks for")
    if surplus := stored.keys() - expected.keys() - optional.keys():
        raise UserError(f"config.json has no place for {shown(surplus)} of the weights")
    for name, wanted in (expected | optional).items():
        if name in stored and stored[name].shape != wanted:
            raise UserError(
                f"{name} must be {_sizes(wanted)} by config.json, the weights hold {_sizes(stored[name].shape)}"
            )
    return shape


def expected_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of a checkpoint with that shape; a tied head is stored once. Nothing is allocated."""
    from hasten.model.shape import outline

    try:
        held = outline(config).state_dict()
    except RuntimeError as error:  # more bytes than 64 bits can count
        raise UserError(f"config.json asks for tensors of an impossible size: {error}") from None
    return {name: tuple(value.shape) for name, value in held.items() if name != HEAD or not config.tied_head}


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
