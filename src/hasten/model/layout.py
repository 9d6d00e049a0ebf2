"""How many bytes a model's weights take, format by format: floats, integers as stored, integers as engines read them.

A quantised matrix is integers and scales. On disk (`hasten.model.grid.stored`) rows of integers fill 32-bit words and
scales are float32; engines pack the same integers behind 16-bit scales, llama.cpp in blocks of 32 (34 bytes in Q8_0,
18 in Q4_0), others with one scale per group. What has no grid stays float. A quantised head is a matrix of its
own beside the embedding, unless the embedding's integers serve a tied one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.grid import Grid, Grids

BLOCK = 32
"""Weights that share a scale in llama.cpp's Q8_0 and Q4_0."""


@dataclass(frozen=True)
class Matrix:
    """`count` matrices of one shape, (rows, columns) = (outputs, inputs)."""

    rows: int
    columns: int
    count: int = 1

    @property
    def weights(self) -> int:
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class Layout:
    """A matrix's bytes. group_size: neighbours in a row that share a scale, 0 means the whole row.

    scale_bytes: of one scale, 0 for floats, which have none. word_bytes: what a row of weights is padded to a multiple
    of. matrix_bytes: what a matrix has beside weights and scales.
    """

    weight_bits: int
    scale_bytes: int = 0
    group_size: int = 0
    word_bytes: int = 1
    matrix_bytes: int = 0

    @property
    def quantised(self) -> bool:
        return self.scale_bytes > 0

    def bytes_of(self, matrix: Matrix) -> int:
        """Raises `UserError` if groups do not divide its columns."""
        if self.group_size and matrix.columns % self.group_size:
            raise UserError(
                f"group_size must divide every matrix's input width, got {self.group_size} for {matrix.columns}"
            )
        scales = matrix.columns // self.group_size if self.group_size else 1
        words = -(-matrix.columns * self.weight_bits // (8 * self.word_bytes))
        row = words * self.word_bytes + scales * self.scale_bytes
        return (matrix.rows * row + self.matrix_bytes) * matrix.count


@dataclass(frozen=True)
class Format:
    """How a whole model is held. matrices: the head too; a tied one is the embedding, unless it is quantised.

    vector_bytes: of one element of a norm or a bias. named: matrices that are held otherwise, by their names in a
    checkpoint (without `.weight`), head and embedding among them.
    """

    matrices: Layout
    embedding: Layout
    vector_bytes: int = 4
    named: Mapping[str, Layout] = field(default_factory=dict)

    @classmethod
    def floats(cls, element_bytes: int = 4) -> Format:
        """Everything in one float type."""
        layout = Layout(8 * element_bytes)
        return cls(layout, layout, element_bytes)

    @classmethod
    def on(cls, grid: Grid | Grids, layout: Callable[[Grid], Layout], element_bytes: int = 4) -> Format:
        """Integers in the layout of their grid, all else floats."""
        from hasten.model.grid import Grids

        plain = Layout(8 * element_bytes)
        if isinstance(grid, Grids):
            return cls(plain, plain, element_bytes, {name: layout(kind) for name, kind in grid.by_name.items()})
        return cls(layout(grid), plain, element_bytes)

    @classmethod
    def stored(cls, grid: Grid | Grids) -> Format:
        """As a quantised checkpoint is stored: 32-bit words, float32 scales, each matrix's shape as two int64."""
        return cls.on(grid, lambda kind: Layout(kind.bits, 4, kind.group_size, word_bytes=4, matrix_bytes=16))

    @classmethod
    def packed(cls, grid: Grid | Grids) -> Format:
        """As an engine reads a grid that it runs natively: integers without gaps, scales of 16 bits.

        Groups of a multiple of 32 are read as llama.cpp's Q8_0 or Q4_0: a scale is repeated in every block of 32.
        """

        def layout(kind: Grid) -> Layout:
            blocks = kind.group_size and kind.group_size % BLOCK == 0
            return Layout(kind.bits, 2, BLOCK if blocks else kind.group_size)

        return cls.on(grid, layout)
