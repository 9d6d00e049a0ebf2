"""The shape of a decoder, as a config (`conf/model/*.yaml`) and as arithmetic.

Names follow the field: `layers` blocks of grouped-query attention (`heads` query heads share
`kv_heads` key/value heads) and a gated feed-forward of width `feed_forward_size`. The defaults are a
Llama; the other fields are what its relatives do differently, each by itself, and `family` says which
Hugging Face architecture has that combination.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hasten.errors import UserError, one_of
from hasten.model.recipe import ModelRecipe

LAYER_TYPES = ("full_attention", "sliding_attention")


class Activation(Enum):
    """What gates the feed-forward: SiLU (SwiGLU) or GELU by its tanh approximation (GeGLU)."""

    silu = "silu"
    gelu_tanh = "gelu_tanh"


class RopeKind(Enum):
    """How rotary positions were stretched beyond the context they were trained on."""

    default = "default"
    linear = "linear"
    llama3 = "llama3"


@dataclass
class RopeScaling:
    """linear: every angle is divided by `factor`. llama3: only the slow ones are, those that turn fewer than
    low_frequency_factor times within original_context; those above high_frequency_factor stay; in between is blended.
    """

    kind: RopeKind = RopeKind.default
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not 1 <= self.factor < float("inf"):
            raise UserError(f"model.rope_scaling.factor must be at least 1, got {self.factor}")
        if self.kind is RopeKind.default and self.factor != 1:
            raise UserError(f"model.rope_scaling.factor must be 1 where kind is default, got {self.factor}")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if self.kind is RopeKind.llama3 and not 0 < low < high < float("inf"):
            raise UserError(
                "model.rope_scaling.low_frequency_factor must lie between 0 and high_frequency_factor "
                f"({high}), got {low}"
            )
        if self.original_context < 1:
            raise UserError(f"model.rope_scaling.original_context must be at least 1, got {self.original_context}")


@dataclass
class ModelConfig(ModelRecipe):
    """A decoder of the Llama family or one of its relatives.

    vocab_size: 0 means the tokenizer's. head_size: 0 means hidden_size / heads. context: the longest
    sequence the model is meant for. tied_head: the output matrix is the embedding.

    qkv_bias, output_bias, mlp_bias: which projections add a bias. head_norm: queries and keys are normalised per head.
    post_norms: each half of a block is normalised again before it joins the residual stream. offset_norms: norm weights
    are stored less one. embedding_scale: embeddings are multiplied by sqrt(hidden_size). attention_scale: what scores
    are multiplied by, 0 means 1 / sqrt(head width). sliding_window: tokens, itself included, that a sliding layer
    attends to, 0 means that none slides; layer_types says which layers do (all, if it is empty). local_rope_theta: the
    rotary base of sliding layers, which no rope_scaling stretches; 0 means that of the others.
    """

    layers: int = 4
    hidden_size: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 0
    feed_forward_size: int = 704
    vocab_size: int = 0
    context: int = 512
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5
    tied_head: bool = True
    initializer_range: float = 0.02
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    post_norms: bool = False
    offset_norms: bool = False
    embedding_scale: bool = False
    attention_scale: float = 0.0
    activation: Activation = Activation.silu
    sliding_window: int = 0
    layer_types: list[str] = field(default_factory=list)
    local_rope_theta: float = 0.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "heads", "kv_heads", "feed_forward_size"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads must divide model.heads ({self.heads}), got {self.kv_heads}")
        self._check_layer_types()
        if self.hidden_size % self.heads and (not self.head_size or self.family in ("llama", "gemma3_text")):
            # also with a head_size of its own: transformers opens no other Llama or Gemma
            raise UserError(f"model.heads must divide model.hidden_size ({self.hidden_size}), got {self.heads}")
        if self.head_size < 0 or self.head_width % 2:
            raise UserError(f"model.head_size must be even (RoPE turns pairs), got {self.head_width}")
        if self.context < 2:
            raise UserError(f"model.context must be at least 2, got {self.context}")
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size must be 0 (the tokenizer's) or more, got {self.vocab_size}")
        if not 0 <= self.initializer_range <= 1:
            raise UserError(f"model.initializer_range must be 0 to 1, got {self.initializer_range}")
        for name, lowest in (("rope_theta", 1.0), ("norm_epsilon", 0.0)):
            if not lowest <= getattr(self, name) < float("inf"):
                raise UserError(f"model.{name} must be at least {lowest} and finite, got {getattr(self, name)}")
        for name, lowest in (("local_rope_theta", 1.0), ("attention_scale", 0.0)):
            if getattr(self, name) and not lowest <= getattr(self, name) < float("inf"):
                raise UserError(f"model.{name} must be 0 (the usual) or above {lowest:g}, got {getattr(self, name)}")
        if self.family == "gemma3_text":
            self._check_gemma()

    def _check_layer_types(self) -> None:
        if self.sliding_window < 0:
            raise UserError(f"model.sliding_window must be 0 (none) or more, got {self.sliding_window}")
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise one_of("model.layer_types", kind, LAYER_TYPES)
        if self.layer_types and len(self.layer_types) != self.layers:
            raise UserError(
                f"model.layer_types must name each of the {self.layers} layers or none, got {len(self.layer_types)}"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("model.sliding_window must be above 0 where model.layer_types has sliding_attention, got 0")

    def _check_gemma(self) -> None:
        """What config.json cannot say of a Gemma."""
        divisor = self.score_scale**-2 if 1e-5 <= self.score_scale <= 1 else 0.0
        if not divisor or abs(divisor - round(divisor)) > 1e-6 * divisor:
            raise UserError(
                f"model.attention_scale must be 0 or 1 / sqrt of a whole number (Gemma 3), got {self.attention_scale}"
            )
        if self.sliding_layers and not self.local_rope_theta and self.rope_scaling.kind is not RopeKind.default:
            raise UserError(
                "model.local_rope_theta must be above 0 beside rope_scaling (Gemma 3 never stretches its sliding "
                "layers), got 0"
            )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_size or self.hidden_size // self.heads

    @property
    def widest(self) -> int:
        """The most values that a token has at one time below the head."""
        return max(self.feed_forward_size, self.hidden_size)

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.attention_scale or self.head_width**-0.5

    def slides(self, layer: int) -> bool:
        """Whether a layer attends to the last `sliding_window` tokens only."""
        if not self.layer_types:
            return self.sliding_window > 0
        return self.layer_types[layer] == "sliding_attention"

    @property
    def sliding_layers(self) -> int:
        """How many layers slide."""
        if not self.layer_types:
            return self.layers if self.sliding_window else 0
        return self.layer_types.count("sliding_attention")

    def attended(self, layer: int, positions: int) -> int:
        """How many of `positions` tokens (the newest included) the newest one attends to."""
        return min(positions, self.sliding_window) if self.slides(layer) else positions

    @property
    def family(self) -> str:
        """The Hugging Face `model_type` that computes this. Raises `UserError` if none does."""
        gemma = (self.post_norms, self.offset_norms, self.embedding_scale, self.activation is Activation.gelu_tanh)
        equal_biases = self.qkv_bias == self.output_bias
        if any(gemma):
            if all((*gemma, self.head_norm, equal_biases, not self.mlp_bias)):
                return "gemma3_text"
            raise UserError(
                "model.post_norms, offset_norms, embedding_scale, head_norm and activation=gelu_tanh come together, "
                "without mlp_bias (Gemma 3): no architecture has only some of them"
            )
        if self.local_rope_theta or self.attention_scale:
            raise UserError("model.local_rope_theta and attention_scale must be 0, only Gemma 3 has them")
        if self.head_norm:
            if equal_biases and not self.mlp_bias:
                return "qwen3"
            raise UserError("model.head_norm comes without mlp_bias and with both attention biases or none (Qwen 3)")
        if self.qkv_bias and not self.output_bias:
            if not self.mlp_bias:
                return "qwen2"
            raise UserError("model.qkv_bias without output_bias comes without mlp_bias (Qwen 2)")
        if not equal_biases:
            raise UserError("model.output_bias comes with qkv_bias (Llama), got output_bias alone")
        if self.sliding_layers:
            if self.sliding_layers == self.layers and not (self.qkv_bias or self.mlp_bias):
                return "mistral"
            raise UserError(
                "model.sliding_window comes without biases and in every layer (Mistral), or with head_norm (Qwen 3) "
                "or with qkv_bias (Qwen 2)"
            )
        return "llama"
