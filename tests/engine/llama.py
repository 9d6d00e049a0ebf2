"""Tiny random Llamas and their relatives as checkpoints and variants, with a real byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.artifacts import Variant, replacing, write_json
from hasten.compression.make import make_variant
from hasten.compression.rtn import Rtn
from hasten.compression.shared import quantiser
from hasten.compression.shared.quantiser import nearest_scale
from hasten.engine.base import Token
from hasten.model.config import Activation, ModelConfig, RopeKind, RopeScaling
from hasten.model.config_json import to_huggingface
from hasten.model.grid import Grid, Grids, portable_scale, quantise, stored
from hasten.model.huggingface import save_checkpoint
from hasten.model.network import Network

VOCABULARY = 320
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>"]
TEXT = ["The quick brown fox jumps over the lazy dog 2026 times.", "今天天气很好，我们去公园散步吧。", "x" * 40] * 4


def shape(**changes: Any) -> ModelConfig:
    """2 layers, grouped-query attention (4 heads share 2 key/value heads), wide enough for groups of 64; a Llama."""
    fields = {"layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "feed_forward_size": 128, "context": 256}
    return ModelConfig(**{**fields, "vocab_size": VOCABULARY, **changes})


def gemma(layer_types: str, **changes: Any) -> ModelConfig:
    """A Gemma 3. layer_types: a letter for each layer, `S` slides (8 tokens) and `F` is full."""
    fields = {
        "post_norms": True,
        "offset_norms": True,
        "embedding_scale": True,
        "head_norm": True,
        "activation": Activation.gelu_tanh,
        "layers": len(layer_types),
        "sliding_window": 8 if "S" in layer_types else 0,
        "layer_types": [{"S": "sliding_attention", "F": "full_attention"}[letter] for letter in layer_types],
        "rope_theta": 1e6,
        "local_rope_theta": 500.0,
    }
    return shape(**{**fields, **changes})


LINEAR = RopeScaling(RopeKind.linear, 4.0)
LLAMA3 = RopeScaling(RopeKind.llama3, 8.0, 1.0, 4.0, 32)

CASES = {
    "llama": shape(),
    "llama-biases": shape(qkv_bias=True, output_bias=True, mlp_bias=True),
    "llama-attention-biases": shape(qkv_bias=True, output_bias=True, tied_head=False),
    "llama-linear": shape(rope_scaling=LINEAR),
    "llama-llama3": shape(rope_scaling=LLAMA3, head_size=32),
    "mistral": shape(sliding_window=256, head_size=32),
    "mistral-llama3": shape(sliding_window=300, rope_scaling=LLAMA3),
    "qwen2": shape(qkv_bias=True),
    "qwen2-linear": shape(qkv_bias=True, rope_scaling=LINEAR, tied_head=False),
    "qwen2-slides-beyond-the-context": shape(qkv_bias=True, sliding_window=256),
    "qwen3": shape(head_norm=True, head_size=32),
    "qwen3-linear": shape(head_norm=True, rope_scaling=LINEAR, kv_heads=1),
    "gemma3": gemma("SSSSSFS", head_size=32),
    "gemma3-every-second": gemma("SFSF", kv_heads=1, tied_head=False),
    "gemma3-all-slide": gemma("SSS"),
    "gemma3-none-slides": gemma("FF"),
    "gemma3-linear": gemma("SFSF", rope_scaling=LINEAR),
    "gemma3-scores-scaled-otherwise": gemma("SF", attention_scale=5**-0.5),
    "gemma3-one-rotary-base": gemma("SFSF", local_rope_theta=0.0),
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 entries (the model has some rows more), digits split one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIALS, strict=True))
    write_json(folder / "tokenizer_config.json", names)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights large enough for the greedy continuation to wander instead of repeating one token."""
    from hasten.model.decoder import Decoder

    torch.manual_seed(seed)
    state = {name: torch.randn(value.shape) * 0.2 for name, value in Decoder(config).state_dict().items()}
    middle = 0 if config.offset_norms else 1
    state.update({name: middle + value / 2 for name, value in state.items() if "norm" in name})
    if config.embedding_scale:  # a scaled embedding would predict itself, were it not small beside what blocks add
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] /= 10
        state["model.norm.weight"] += 9
    if config.tied_head:
        del state["lm_head.weight"]
    return state


def quantised(tensors: dict[str, torch.Tensor], grid: Grid) -> dict[str, torch.Tensor]:
    """Every matrix but the embedding, rounded to nearest on `grid`."""
    result = dict(tensors)
    for name, weight in tensors.items():
        if weight.dim() == 2 and "embed" not in name:
            source = name.removesuffix(".weight")
            groups = weight.view(weight.shape[0], grid.groups(weight.shape[1]), -1)
            scale = portable_scale(groups.abs().amax(-1) / grid.highest)
            del result[name]
            result.update(stored(source, quantise(weight, scale, grid), scale, grid))
    return result


def variant(
    folder: Path, config: ModelConfig, tensors: dict[str, torch.Tensor] | None = None, grid: Grid | None = None
) -> Variant:
    """Write a variant with these tensors (random ones if none are given) to `folder`."""
    tensors = random_tensors(config) if tensors is None else tensors
    manifest = {
        "kind": "variant",
        "name": folder.name,
        "lineage": [folder.name],
        "grid": grid.describe() if grid else None,
    }
    tokenizer = folder.parent / "tokenizer"
    if not tokenizer.is_dir():
        with replacing(tokenizer) as temporary:
            temporary.mkdir()
            write_tokenizer(temporary)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_checkpoint(folder, to_huggingface(config, bos_id=0, eos_id=1, pad_id=2), tensors, tokenizer, manifest)
    return Variant(folder)


def on_grid(variant: Variant, bits: int, group_size: int) -> Variant:
    """A float variant's child beside it, rounded to nearest."""
    name, method = f"int{bits}-{group_size}", Rtn(bits=bits, group_size=group_size)
    return make_variant(method, variant, None, name=name, target=variant.path.with_name(name), seed=0)[0]


def on_grids(variant: Variant, name: str, by_name: Mapping[str, Grid]) -> Variant:
    """A float variant's child beside it, each of these matrices rounded to nearest on a grid of its own."""
    integers = {}
    for matrix, grid in by_name.items():
        weight = variant.tensors()[f"{matrix}.weight"]
        scale = nearest_scale(weight, grid)
        integers[f"{matrix}.weight"] = quantise(weight, scale, grid), scale
    made = quantiser.on_grid(Grids(by_name), variant.config, variant.tensors(), integers, {})
    assert made.grid is not None
    target = variant.path.with_name(name)
    manifest = {**variant.manifest, "name": name, "grid": made.grid.describe()}
    save_checkpoint(target, made.config, made.tensors, variant.path, manifest)
    return Variant(target)


def rewrite(checkpoint: Variant, changes: dict[str, torch.Tensor | None]) -> Variant:
    """The same checkpoint with some tensors replaced or (None) left out."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor | None] = {**checkpoint.tensors(), **changes}
    save_file(
        {name: value for name, value in tensors.items() if value is not None}, checkpoint.path / "model.safetensors"
    )
    return Variant(checkpoint.path)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def ids(stream: Iterable[Token]) -> list[int]:
    return [token.id for token in stream]


def far_from_best(model: Network, asked: tuple[int, ...], found: list[int]) -> float:
    """By how much a logit lay above that of the token found, at most, in a network without a cache."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*asked, *found]]))[0, len(asked) - 1 : -1]
    return float((logits.max(-1).values - logits[range(len(found)), found]).max())
