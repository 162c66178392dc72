"""Keep the entries of a matrix that are not zero, and multiply with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.codes.lanes import aligned
from ckptdiff.linalg.kernels.nonzeros import STRIP, add_listed_product, list_columns, list_rows
from ckptdiff.linalg.threads import count_work, cuts, end_if_stopped, in_parts, thread_count

Floats = NDArray[Any]

MOST_LISTED = 1 << 16
"""Rows, and columns, of a matrix that can be listed: a place has 16 bits."""
_GATHERED, _ADDED = 60.0, 6.0
"""The work of looking at an entry, and of adding one to a column of a product, twice."""


@dataclass(frozen=True, slots=True)
class Listed:
    """The entries of a matrix that are not zero, row by row."""

    places: NDArray[np.uint16]
    """The column of each."""
    values: Floats
    ends: NDArray[np.int64]
    """How many there are up to the end of each row."""

    @classmethod
    def of(cls, matrix: Floats) -> Listed:
        """List those of a C-contiguous matrix."""
        listed = cls._room(matrix.size, len(matrix), matrix.dtype)
        list_rows(matrix, listed.places, listed.values, listed.ends)
        return listed

    @classmethod
    def transposed(cls, matrix: Floats, first: int, stop: int) -> Listed:
        """List those of rows `first` to ``stop - 1`` of ``matrix.T``, for a C-contiguous matrix."""
        listed = cls._room(len(matrix) * (stop - first), stop - first, matrix.dtype)
        list_columns(matrix, first, listed.places, listed.values, listed.ends)
        return listed

    @classmethod
    def _room(cls, size: int, rows: int, dtype: np.dtype[Any]) -> Listed:
        # What is not written to takes no memory.
        return cls(np.empty(size, np.uint16), np.empty(size, dtype), np.empty(rows, np.int64))

    def trimmed(self) -> Listed:
        """The same without the room that is left."""
        size = int(self.ends[-1]) if self.ends.size else 0
        return Listed(self.places[:size].copy(), self.values[:size].copy(), self.ends)

    def add_product(self, out: Floats, strips: Floats, most: int | None = None) -> None:
        """Add the product with what :func:`in_strips` gives.

        Of the first row `most` columns are added, and one more of each row after it.
        """
        line, most = aligned((1, strips.shape[2]), strips.dtype), out.shape[1] if most is None else most
        add_listed_product(self.places, self.values, self.ends, strips, most, line, out)


def in_strips(matrix: Floats) -> Floats:
    """Some columns of a matrix after the other, ``STRIP`` bytes wide: shape (strips, rows, columns of a strip)."""
    rows, columns = matrix.shape
    width = STRIP // matrix.itemsize
    whole, rest = divmod(columns, width)
    strips = aligned((whole + bool(rest), rows, width), matrix.dtype)
    at = cuts(rows)

    def copy(part: int) -> None:
        first, stop = at[part], at[part + 1]
        full = matrix[first:stop, : whole * width].reshape(stop - first, whole, width)
        strips[:whole, first:stop] = full.swapaxes(0, 1)
        if rest:
            strips[whole, first:stop, :rest] = matrix[first:stop, whole * width :]
            strips[whole, first:stop, rest:] = 0

    in_parts(copy, len(at) - 1)
    return strips


def add_sparse_product(out: Floats, left: Floats, right: Floats, work: float = 0.0, *, triangle: bool = False) -> None:
    """Add ``left @ right``, or its lower triangle alone, skipping the zeros of the left side.

    All are C-contiguous, but that the left side may be the transpose of what is. It counts as so much work.
    """
    strips = in_strips(right)
    # Each row is a sum of its own, in the order of its entries, however many rows a thread takes.
    parts = min(len(out), thread_count())
    at = [int(len(out) * (part / parts) ** (0.5 if triangle else 1.0)) for part in range(parts + 1)]
    turned = not left.flags.c_contiguous

    def add(part: int) -> None:
        first, stop = at[part], at[part + 1]
        listed = Listed.transposed(left.T, first, stop) if turned else Listed.of(left[first:stop])
        listed.add_product(out[first:stop], strips, first + 1 if triangle else None)

    in_parts(add, parts, work)


class Nonzeros:
    """A matrix d of mostly zeros, which comes in panels, and ``d.T @ d`` by its other entries."""

    def __init__(self, *panels: Floats) -> None:
        self._panels: list[tuple[Listed, Listed]] = []
        for panel in panels:
            self.add(panel)

    def add(self, panel: Floats) -> None:
        """Take a C-contiguous panel, of 65,536 rows and columns at most."""
        sides = Listed.of(panel), Listed.transposed(panel, 0, panel.shape[1])
        self._panels.append((sides[0].trimmed(), sides[1].trimmed()))
        count_work(_GATHERED * panel.size)

    @staticmethod
    def needs(count: int, itemsize: int) -> int:
        """Bytes of so many entries: each is there by its row and by its column."""
        return 2 * count * (2 + itemsize)

    def squared_product(self, block: Floats) -> Floats:
        """``d.T @ (d @ block)``."""
        strips, out = in_strips(block), np.zeros(block.shape, block.dtype)
        for rows, columns in self._panels:
            end_if_stopped()
            image = np.zeros((rows.ends.size, block.shape[1]), block.dtype)
            rows.add_product(image, strips)
            columns.add_product(out, in_strips(image))
            count_work(_ADDED * block.shape[1] * rows.values.size)
        return out
