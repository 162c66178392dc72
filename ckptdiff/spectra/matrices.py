"""List the matrices that a tensor is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MatrixView:
    """A matrix inside a tensor, stored row by row."""

    offset: int
    """Its first element."""
    rows: int
    columns: int

    @property
    def wide(self) -> bool:
        """Whether its rows are its short side, so that it is read transposed."""
        return self.rows < self.columns

    @property
    def long(self) -> int:
        """The larger of both sizes."""
        return max(self.rows, self.columns)

    @property
    def short(self) -> int:
        """The smaller of both sizes."""
        return min(self.rows, self.columns)


def matrices_of(name: str, shape: tuple[int, ...]) -> list[MatrixView]:
    """The matrices of a tensor.

    A tensor of three or more axes whose name speaks of experts is one matrix per index of the first; others
    (convolutions) become (out, rest). Vectors and scalars have none, nor has a tensor without elements.
    """
    numel = math.prod(shape)
    if len(shape) < 2 or not numel:
        return []
    experts = len(shape) > 2 and "expert" in name.lower()
    count, rows = (shape[0], shape[1]) if experts else (1, shape[0])
    size = numel // count
    return [MatrixView(i * size, rows, size // rows) for i in range(count)]
