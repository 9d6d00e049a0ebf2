"""The smallest real artifacts: a 100-word tokenizer, tokens, checkpoints and variants of a tiny decoder or LSTM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.artifacts import Checkpoint, Tokens, Variant, write_json
from hasten.ceilings import record_path
from hasten.hardware import machine
from hasten.model.config import Activation, ModelConfig
from hasten.model.decoder import Decoder
from hasten.model.huggingface import network_tensors, save_checkpoint
from hasten.model.lstm import Lstm
from hasten.model.lstm_config import LstmConfig
from hasten.model.network import Network
from hasten.model.shape import write_shape
from hasten.training.options import Precision, Training

torch.set_num_threads(1)  # such small matrices lose more than they gain by sharing

VOCABULARY = 100
GEMMA: dict[str, Any] = {
    "head_norm": True,
    "post_norms": True,
    "offset_norms": True,
    "embedding_scale": True,
    "activation": Activation.gelu_tanh,
}
"""What a Gemma has beside a Llama."""
SPECIALS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


def shape(**changes: Any) -> ModelConfig:
    """2 blocks, 32 wide, 4 query heads on 2 key/value heads."""
    fields = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "feed_forward_size": 64, "context": 64}
    return ModelConfig(**{**fields, "vocab_size": VOCABULARY, **changes})


def decoder(config: ModelConfig | None = None, seed: int = 0, spread: float = 0.3) -> Decoder:
    """Random weights, norms too, large enough that logits differ by whole units."""
    model = Decoder(config or shape())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            around = 0.0 if name.endswith("bias") or model.config.offset_norms else 1.0
            weight.copy_(drawn * spread if weight.dim() > 1 else around + 0.2 * drawn)
    return model.eval()


def lstm_shape(**changes: Any) -> LstmConfig:
    """2 layers in the encoder and 2 in the decoder, 32 wide."""
    return LstmConfig(**{"layers": 2, "hidden_size": 32, "context": 64, "vocab_size": VOCABULARY, **changes})


def lstm(config: LstmConfig | None = None, seed: int = 0, spread: float = 0.6) -> Lstm:
    """Random weights, biases too, large enough that what was read long ago still shows."""
    model = Lstm(config or lstm_shape())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model.eval()


def write_tokenizer(folder: Path) -> Path:
    """One id per word: `w3` is 3 ... `w99` is 99; 0, 1 and 2 are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIALS.values(), *(f"w{number}" for number in range(3, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w3"))
    backend.add_special_tokens(list(SPECIALS.values()))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIALS})
    return folder


def write_tokens(folder: Path, train: int = 4000, validation: int = 400) -> Tokens:
    """Counting sequences (learnable) in documents of 20 tokens, the first half English, of source `counting`."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, Any] = {}
    for split, size in (("train", train), ("validation", validation)):
        (np.arange(size) % 40 + 3).astype(np.uint16).tofile(folder / f"{split}.bin")
        offsets = np.append(np.arange(0, size, 20), size).astype(np.int64)
        np.save(folder / f"{split}.offsets.npy", offsets)
        documents = len(offsets) - 1
        codes = (np.arange(documents) >= (documents + 1) // 2).astype(np.uint8)
        np.save(folder / f"{split}.languages.npy", codes)
        counts = {name: int(np.diff(offsets)[codes == code].sum()) for code, name in enumerate(("en", "zh"))}
        splits[split] = {
            name: {"documents": int((codes == code).sum()), "tokens": counts[name], "bytes": counts[name] * (2 + code)}
            for code, name in enumerate(("en", "zh"))
        }
    facts = {"schema": 1, "kind": "tokens", "dtype": "uint16", "languages": ["en", "zh"], "vocab_size": VOCABULARY}
    groups = [
        {"source": "counting", "language": name, "splits": {split: sizes[name] for split, sizes in splits.items()}}
        for name in ("en", "zh")
    ]
    write_json(folder / "manifest.json", {**facts, "splits": splits, "groups": groups})
    return Tokens(folder)


def write_checkpoint(
    folder: Path,
    model: Network | None = None,
    *,
    kind: str = "checkpoint",
    tensors: dict[str, torch.Tensor] | None = None,
    **facts: Any,
) -> Checkpoint:
    """A network (a random decoder if none is given) with its tokenizer. facts: more of the manifest."""
    model = model or decoder()
    tokenizer = folder.with_name("tokenizer")
    if not tokenizer.is_dir():
        write_tokenizer(tokenizer)
    config = write_shape(model.config, bos_id=0, eos_id=1, pad_id=2)
    manifest = {"kind": kind, "grid": None, **facts}
    save_checkpoint(folder, config, tensors or network_tensors(model), tokenizer, manifest)
    return Variant(folder) if kind == "variant" else Checkpoint(folder)


def write_variant(folder: Path, model: Network | None = None) -> Variant:
    """A float baseline."""
    made = write_checkpoint(folder, model, kind="variant", name=folder.name, method="identity", lineage=[folder.name])
    assert isinstance(made, Variant)
    return made


def write_ceilings(folder: Path, threads: int) -> None:
    """What this machine would have measured, so that a stage in `folder` does not measure for half a minute."""
    where = folder / ".work" / "ceilings"
    where.mkdir(parents=True, exist_ok=True)
    reads = [{"working_set_bytes": size, "bytes_per_second": 1e10} for size in (2**20, 2**30)]
    record = {
        "schema": 1, "machine": machine()["id"], "attempts": 1, "validity": "valid", "device": "cpu",
        "read_bytes_per_second": reads, "cache_bytes_per_second": 1e10, "dram_bytes_per_second": 1e10,
        "matmul_flops_per_second": {"float32": 1e11, "bfloat16": 2e11, "float16": None, "int8": None}, "why": {},
    }  # fmt: skip
    write_json(record_path(machine()["id"], threads, folder=where), record)


def training(**changes: Any) -> Training:
    """A dozen float32 steps on one thread."""
    fields: dict[str, Any] = {
        "steps": 12,
        "batch_size": 4,
        "sequence_length": 16,
        "learning_rate": 1e-2,
        "precision": Precision.float32,
        "accelerator": "cpu",
        "threads": 1,
        "validate_every_steps": 6,
        "checkpoint_every_steps": 4,
        "log_every_steps": 2,
    }
    return Training(**{**fields, **changes})


class Curves:
    """Where a fit's figures and texts go: (step, values) in order, texts by name."""

    def __init__(self) -> None:
        self.points: list[tuple[int | None, dict[str, float | None]]] = []
        self.texts: dict[str, str] = {}
        self.description = ""

    def metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        self.points.append((step, dict(values)))

    def text(self, name: str, content: str) -> None:
        self.texts[name] = content

    def describe(self, markdown: str) -> None:
        self.description = markdown

    def curve(self, name: str) -> dict[int | None, float]:
        return {step: value for step, values in self.points if (value := values.get(name)) is not None}
