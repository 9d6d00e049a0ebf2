"""What a model costs to run, as arithmetic on its shape.

Decoding one token at batch 1 reads every weight once (of the embedding one row, unless the head is tied to it) and
the keys and values of all positions it attends to; it does two FLOPs per weight. Prefill does the same FLOPs per
token but reads the weights once for all of them. Time cannot be below bytes / bandwidth nor below FLOPs / rate: the
roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785).

Everything is counted, nothing estimated: tests hold it against the tensors of real checkpoints and against
`torch.utils.flop_counter`. What one machine makes of it:

    python -m hasten.model.cost model=1b model.layers=8
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.model.config import ModelConfig
from hasten.model.layout import Format, Matrix
from hasten.model.low_rank_config import LowRankConfig, matrix_sizes, projections
from hasten.model.lstm_config import LstmConfig

if TYPE_CHECKING:
    from hasten.model.shape import Shape

FLOAT32 = Format.floats(4)
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


class NetworkCost(ABC):
    """What every network's cost says. Counts are exact; FLOPs are those of matrix products (two per weight and token).

    An implementation names its matrices and vectors, those it stores and those that decoding a token reads; sizes
    and bytes follow. Its state is called KV here: what it keeps of past tokens, whether that grows with them or not.
    """

    config: Any
    """Its shape: `vocab_size` and `tied_head` are used here."""

    @property
    @abstractmethod
    def embedding(self) -> Matrix:
        """The table of token embeddings."""

    @property
    @abstractmethod
    def head(self) -> Matrix:
        """The output matrix; the same weights as the embedding if `tied_head`."""

    @property
    @abstractmethod
    def matrices(self) -> list[Matrix]:
        """All that is stored beside embedding and head."""

    @property
    @abstractmethod
    def vector_parameters(self) -> int:
        """Norms and biases, all that are stored."""

    @property
    def decoding_matrices(self) -> list[Matrix]:
        """Those of `matrices` that decoding one token reads."""
        return self.matrices

    @property
    def decoding_vectors(self) -> int:
        """Those of `vector_parameters` that decoding one token reads."""
        return self.vector_parameters

    @abstractmethod
    def kv_bytes(self, tokens: int, element_bytes: float = 2) -> int:
        """The state after that many tokens, as it is allocated."""

    @abstractmethod
    def kv_bytes_read(self, positions: int, element_bytes: float = 2) -> int:
        """What decoding a token reads of the state, the token being the last of `positions`."""

    @abstractmethod
    def prefill_flops(self, tokens: int, logits: int | None = None) -> int:
        """Forward FLOPs of a prompt. logits: for how many positions the head is computed, all by default."""

    @abstractmethod
    def decode_flops(self, positions: int) -> int:
        """Forward FLOPs of one token that is the last of `positions`."""

    @abstractmethod
    def training_flops(self, tokens: int, sequence_length: int) -> int:
        """Forward and backward over `tokens` in sequences of that length."""

    @property
    def parameters(self) -> int:
        """Everything that is stored."""
        embeddings = self.embedding.weights + (0 if self.config.tied_head else self.head.weights)
        return sum(matrix.weights for matrix in self.matrices) + self.vector_parameters + embeddings

    @property
    def parameters_per_token(self) -> int:
        """Weights that decoding one token reads: matrices, vectors, the head; of an embedding of its own, one row."""
        row = 0 if self.config.tied_head else self.embedding.columns
        matrices = sum(matrix.weights for matrix in self.decoding_matrices)
        return matrices + self.decoding_vectors + self.head.weights + row

    def weight_bytes(self, held: Format = FLOAT32) -> int:
        """Every weight in a format. Raises `UserError` if its groups do not divide a matrix."""
        return self._bytes(held, self.matrices, self.vector_parameters, self.embedding.rows)

    def weight_bytes_per_token(self, held: Format = FLOAT32) -> int:
        """What decoding one token reads of them. Raises `UserError` if the format's groups do not divide a matrix."""
        return self._bytes(held, self.decoding_matrices, self.decoding_vectors, 1)

    def prefill_weight_bytes(self, held: Format = FLOAT32) -> int:
        """What a prefill reads, once for all its tokens: every weight, of an embedding of its own one row."""
        return self._bytes(held, self.matrices, self.vector_parameters, 1)

    def _bytes(self, held: Format, matrices: list[Matrix], vectors: int, rows: int) -> int:
        """rows: how many of the embedding, where it is not the head."""
        head, table = held.named.get(HEAD, held.matrices), held.named.get(EMBEDDING, held.embedding)
        inner = sum(held.matrices.bytes_of(matrix) for matrix in matrices) + vectors * held.vector_bytes
        if named := held.named.keys() - {HEAD, EMBEDDING}:
            shapes = self.shapes()
            inner += sum(
                held.named[name].bytes_of(shapes[name]) - held.matrices.bytes_of(shapes[name]) for name in named
            )
        if self.config.tied_head and not head.quantised:
            return inner + table.bytes_of(self.head)
        return inner + head.bytes_of(self.head) + table.bytes_of(Matrix(rows, self.embedding.columns))

    def shapes(self) -> dict[str, Matrix]:
        """Every matrix by its name in a checkpoint (without `.weight`)."""
        from hasten.model.shape import outline

        tensors = outline(self.config).state_dict()
        return {
            name.removesuffix(".weight"): Matrix(*value.shape) for name, value in tensors.items() if value.dim() == 2
        }


@dataclass(frozen=True)
class Cost(NetworkCost):
    """A decoder's cost."""

    config: ModelConfig

    @property
    def embedding(self) -> Matrix:
        return Matrix(self.config.vocab_size, self.config.hidden_size)

    @property
    def head(self) -> Matrix:
        return self.embedding

    @property
    def matrices(self) -> list[Matrix]:
        return [Matrix(*size, self.config.layers) for size in projections(self.config).values()]

    @property
    def vector_parameters(self) -> int:
        return self.norm_parameters + self.bias_parameters

    @property
    def block_parameters(self) -> int:
        """Matrix weights of all blocks."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def norm_parameters(self) -> int:
        """Two or four norms in a block, those of queries and keys, one at the end."""
        c = self.config
        block = (4 if c.post_norms else 2) * c.hidden_size + (2 * c.head_width if c.head_norm else 0)
        return c.layers * block + c.hidden_size

    @property
    def bias_parameters(self) -> int:
        c = self.config
        attention = (c.heads + 2 * c.kv_heads) * c.head_width * c.qkv_bias + c.hidden_size * c.output_bias
        return c.layers * (attention + (2 * c.feed_forward_size + c.hidden_size) * c.mlp_bias)

    def attended(self, positions: int) -> int:
        """How many of `positions` the last one attends to, summed over the layers: a sliding one sees its window."""
        return sum(self.config.attended(layer, positions) for layer in range(self.config.layers))

    def kv_bytes(self, tokens: int, element_bytes: float = 2) -> int:
        """KV cache of that many tokens; sliding layers keep them all too."""
        return round(2 * self.config.kv_heads * self.config.head_width * self.config.layers * tokens * element_bytes)

    def kv_bytes_read(self, positions: int, element_bytes: float = 2) -> int:
        """Keys and values that one token reads, its own included; sliding layers read their window at most."""
        return round(2 * self.config.kv_heads * self.config.head_width * self.attended(positions) * element_bytes)

    def prefill_flops(self, tokens: int, logits: int | None = None) -> int:
        """Forward FLOPs of a prompt, attention counted as a dense product of all with all.

        So the mask saves nothing, neither the causal one (as for PaLM, Chowdhery et al. 2022, appendix B) nor a window.
        logits: for how many positions the head is computed, all by default.
        """
        c = self.config
        head = 2 * (tokens if logits is None else logits) * self.head.weights
        attention = 4 * c.layers * c.heads * c.head_width * tokens * tokens
        return 2 * tokens * self.block_parameters + head + attention

    def decode_flops(self, positions: int) -> int:
        """Forward FLOPs of one token that is the last of `positions`; sliding layers see their window alone."""
        c = self.config
        matrices = 2 * (self.block_parameters + self.head.weights)
        return matrices + 4 * c.heads * c.head_width * self.attended(positions)

    def training_flops(self, tokens: int, sequence_length: int) -> int:
        """Forward and backward (twice the forward) over `tokens` in sequences of that length."""
        return 3 * self.prefill_flops(sequence_length) * tokens // sequence_length


@dataclass(frozen=True)
class LowRankCost(Cost):
    """With factored matrices, each of them two: the same arithmetic on thinner ones."""

    config: LowRankConfig

    @property
    def matrices(self) -> list[Matrix]:
        found: list[Matrix] = []
        for name, (rows, columns) in matrix_sizes(self.config).items():
            rank = self.config.ranks.get(name)
            found += [Matrix(rank, columns), Matrix(rows, rank)] if rank else [Matrix(rows, columns)]
        return found


def cost_of(shape: Shape) -> NetworkCost:
    """The cost of a network by its shape."""
    if isinstance(shape, LstmConfig):
        from hasten.model.lstm_cost import LstmCost

        return LstmCost(shape)
    if isinstance(shape, LowRankConfig):
        return LowRankCost(shape)
    return Cost(shape)


if __name__ == "__main__":
    import sys

    from hasten.model.cost_report import main

    main(sys.argv[1:])
