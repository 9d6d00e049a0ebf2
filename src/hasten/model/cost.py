"""What a model costs to run, as arithmetic on its config.

Decoding one token at batch 1 reads every weight once (the embedding only one row, unless the head
is tied to it) and the whole KV cache; it does two FLOPs per weight. Prefill does the same FLOPs per
token but reads the weights once for all of them. Time cannot be below bytes / bandwidth nor below
FLOPs / rate: the roofline (Williams et al. 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.model.config import ModelConfig


@dataclass(frozen=True)
class Cost:
    """Counts for one model; methods give what depends on length or format."""

    config: ModelConfig

    @property
    def block_matrix_parameters(self) -> int:
        """Matrix weights of one block."""
        c = self.config
        attention = c.hidden_size * c.head_width * (2 * c.heads + 2 * c.kv_heads)
        return attention + 3 * c.hidden_size * c.feed_forward_size

    @property
    def norm_parameters(self) -> int:
        return (2 * self.config.layers + 1) * self.config.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """One matrix of vocabulary x hidden."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def parameters(self) -> int:
        """Everything that is stored."""
        matrices = self.config.layers * self.block_matrix_parameters
        embeddings = self.embedding_parameters * (1 if self.config.tied_head else 2)
        return matrices + embeddings + self.norm_parameters

    @property
    def parameters_per_token(self) -> int:
        """Weights that decoding one token reads: blocks, norms, the head; not the embedding table."""
        return self.config.layers * self.block_matrix_parameters + self.norm_parameters + self.embedding_parameters

    def weight_bytes_per_token(self, matrix_bytes: float = 4.0, head_bytes: float = 4.0) -> int:
        """Bytes read per decoded token, given bytes per weight of blocks and head; norms are float32."""
        matrices = self.config.layers * self.block_matrix_parameters * matrix_bytes
        return round(matrices + self.embedding_parameters * head_bytes + self.norm_parameters * 4)

    def kv_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """KV cache of that many tokens."""
        return 2 * self.config.layers * self.config.kv_heads * self.config.head_width * tokens * element_bytes

    def prefill_flops(self, tokens: int, logits: int | None = None) -> int:
        """Forward FLOPs of a prompt, causal attention counted in full (as for PaLM, Chowdhery et al. 2022, appendix B).

        logits: for how many positions the head is computed, all by default.
        """
        c = self.config
        head = 2 * (tokens if logits is None else logits) * self.embedding_parameters
        matrices = 2 * tokens * c.layers * self.block_matrix_parameters + head
        attention = 4 * c.layers * c.heads * c.head_width * tokens * tokens
        return matrices + attention

    def decode_flops(self, positions: float) -> int:
        """Forward FLOPs of one token that attends to that many positions (itself among them)."""
        c = self.config
        matrices = 2 * (c.layers * self.block_matrix_parameters + self.embedding_parameters)
        return matrices + round(4 * c.layers * c.heads * c.head_width * positions)

    def training_flops(self, tokens: int, sequence_length: int) -> int:
        """Forward and backward (twice the forward) over `tokens` in sequences of that length."""
        return 3 * self.prefill_flops(sequence_length) * tokens // sequence_length
