"""What an LSTM costs to run: no KV cache that grows, and a prompt whose tokens cannot be read at once.

Every token passes one of the two stacks: the encoder reads the prompt, the decoder everything from the prompt's last
token on, so a sequence of T tokens makes T + 1 steps of either shape whatever its prompt. Decoding one token reads
the decoder, the head and a state of constant size; a prefill reads the encoder besides. The roofline is a floor that
prefill stays well above: every weight is counted once for all tokens, as for any network, but each step waits for the
one before and reads the encoder's matrices again (from the processor's cache, if they fit).
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.model.cost import NetworkCost
from hasten.model.layout import Matrix
from hasten.model.lstm_config import LstmConfig


@dataclass(frozen=True)
class LstmCost(NetworkCost):
    """An LSTM's cost."""

    config: LstmConfig

    @property
    def embedding(self) -> Matrix:
        return Matrix(self.config.vocab_size, self.config.input_width)

    @property
    def head(self) -> Matrix:
        return Matrix(self.config.vocab_size, self.config.hidden_size)

    def stacks(self, count: int) -> list[Matrix]:
        """The matrices of one stack of layers, or of both: four gates of the input's width and of the state's."""
        c = self.config
        rows = 4 * c.hidden_size
        return [Matrix(rows, c.input_width, count), Matrix(rows, c.hidden_size, count * (2 * c.layers - 1))]

    @property
    def matrices(self) -> list[Matrix]:
        return self.stacks(2)

    @property
    def decoding_matrices(self) -> list[Matrix]:
        """The decoder's: the encoder has read the prompt by then."""
        return self.stacks(1)

    @property
    def decoding_vectors(self) -> int:
        return 4 * self.config.hidden_size * self.config.layers

    @property
    def vector_parameters(self) -> int:
        return 2 * self.decoding_vectors

    @property
    def step_flops(self) -> int:
        """One token through one stack."""
        return 2 * sum(matrix.weights for matrix in self.stacks(1))

    def kv_bytes(self, tokens: int, element_bytes: float = 2) -> int:
        """Its memory, h and c of every layer of the decoder: the same however many tokens."""
        return round(2 * self.config.layers * self.config.hidden_size * element_bytes)

    def kv_bytes_read(self, positions: int, element_bytes: float = 2) -> int:
        return self.kv_bytes(positions, element_bytes)

    def prefill_flops(self, tokens: int, logits: int | None = None) -> int:
        """All tokens through the encoder and the last through the decoder; for all logits, the first, and all.

        That is one step more than tokens either way. logits: for how many positions the head is computed, all by
        default.
        """
        return (tokens + 1) * self.step_flops + 2 * (tokens if logits is None else logits) * self.head.weights

    def decode_flops(self, positions: int) -> int:
        """The same at every position."""
        return self.step_flops + 2 * self.head.weights

    def training_flops(self, tokens: int, sequence_length: int) -> int:
        """Forward and backward (twice the forward) over `tokens` in sequences of that length, logits for all.

        Where a prompt is read that is not predicted, the head has less to do. Rows of a batch that are split at
        different places are computed side by side, each as long as the longest: that is not counted.
        """
        return 3 * self.prefill_flops(sequence_length) * tokens // sequence_length
