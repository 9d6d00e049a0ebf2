"""Tiny models with random weights of every family, built by transformers from its own config classes."""

from __future__ import annotations

import json
from typing import Any

import torch

from hasten.artifacts import Json
from hasten.model.config_json import from_huggingface
from hasten.model.decoder import Decoder

VOCABULARY = 97

BASE: Json = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 300.0,
}
SLIDING, FULL = "sliding_attention", "full_attention"
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
GEMMA: Json = {"head_dim": 12, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]}

CASES: dict[str, tuple[str, Json]] = {
    "llama-gqa": ("llama", {}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-mha-narrow-heads": ("llama", {"num_key_value_heads": 4, "head_dim": 6}),
    "llama-heads-wider-than-hidden": ("llama", {"head_dim": 26}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-epsilon-theta": ("llama", {"rms_norm_eps": 0.1, "rope_parameters": {"rope_theta": 7.0}}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-no-window-wide-heads": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "mistral-mqa-window-of-2": ("mistral", {"sliding_window": 2, "num_key_value_heads": 1}),
    "mistral-linear-rope": ("mistral", {"sliding_window": 9, "rope_parameters": LINEAR}),
    "qwen2-gqa": ("qwen2", {}),
    "qwen2-mha-tied": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2-heads-of-their-own-width": ("qwen2", {"head_dim": 10}),
    "qwen2-slides-from-layer-1": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2-linear-rope": ("qwen2", {"rope_parameters": LINEAR, "num_key_value_heads": 1}),
    "qwen3-gqa": ("qwen3", {"head_dim": 12}),
    "qwen3-mqa-wide-heads-biases": ("qwen3", {"head_dim": 30, "num_key_value_heads": 1, "attention_bias": True}),
    "qwen3-mixed-layers": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "qwen3-mha-tied-llama3-rope": (
        "qwen3",
        {"head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "gemma3-mixed-layers": ("gemma3_text", GEMMA),
    "gemma3-all-sliding-by-pattern": ("gemma3_text", {"head_dim": 12, "sliding_window": 3}),
    "gemma3-all-full": ("gemma3_text", {**GEMMA, "layer_types": [FULL] * 3}),
    "gemma3-mqa-scale-biases": (
        "gemma3_text",
        {**GEMMA, "num_key_value_heads": 1, "query_pre_attn_scalar": 5, "attention_bias": True},
    ),
    "gemma3-mha-untied-wide-heads": (
        "gemma3_text",
        {**GEMMA, "num_key_value_heads": 4, "head_dim": 22, "tie_word_embeddings": False},
    ),
    "gemma3-stretched-full-layers": (
        "gemma3_text",
        {**GEMMA, "rope_parameters": {FULL: {**LINEAR, "rope_theta": 1000.0}, SLIDING: LOCAL}},
    ),
}
FAMILY_CASES = ("llama-gqa", "mistral-window", "qwen2-gqa", "qwen3-mixed-layers", "gemma3-mixed-layers")
"""One case for each family."""


def their_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **json.loads(json.dumps({**BASE, **changes})))


def their_model(family: str, seed: int = 0, spread: float = 0.2, **changes: Any) -> Any:
    """A transformers model whose weights, norms and biases too, are random enough to tell layouts apart."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(their_config(family, **changes), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(drawn * spread)
            else:
                weight.add_(0.3 * drawn)  # to the 1 of a norm (Gemma's 0), to a bias
            if family == "gemma3_text" and "layers." in name and ".post_" in name:
                weight.add_(4)  # else its scaled embedding drowns the layers, and a tied head repeats the last token
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def our_model(theirs: Any) -> Decoder:
    """The same weights here, by way of the `config.json` that transformers writes."""
    model = Decoder(from_huggingface(json.loads(theirs.config.to_json_string(use_diff=False)))).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_logits(theirs: Any, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Logits of transformers where the first `padding` ids of each row are padding."""
    mask = torch.arange(ids.shape[1]) >= padding[:, None]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits: torch.Tensor = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    return logits


def greedy(model: Decoder, ids: torch.Tensor, steps: int, padding: torch.Tensor | None = None) -> torch.Tensor:
    """The next `steps` tokens, (B, steps), with a cache."""
    cache = model.new_state(len(ids), ids.shape[1] + steps, torch.float32)
    made = []
    with torch.inference_mode():
        for step in range(steps):
            ids = model(ids, cache, padding if step == 0 else None)[:, -1:].argmax(-1)
            made.append(ids)
    return torch.cat(made, dim=1)
