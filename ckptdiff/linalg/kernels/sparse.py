"""Kernels for products of a matrix that is mostly zero, as updates of bfloat16 weights are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.tiles import Array

_LINES = 256
"""Rows whose entries are gathered by column at a time: so many rows of the right side stay in the cache."""


@kernel
def add_sparse_product(out: Array, left: Array, right: Array) -> None:
    """Add ``left @ right``, skipping the zeros of the left side.

    Parameters
    ----------
    out : float array, shape (rows, columns)
    left : float array, shape (rows, inner)
    right : float array, shape (inner, columns)
        All are C-contiguous and of one dtype.
    """
    places, values = np.empty(left.shape[1], np.int32), np.empty(left.shape[1], left.dtype)
    for i in range(left.shape[0]):
        found = 0
        for k in range(left.shape[1]):
            places[found], values[found] = k, left[i, k]
            found += left[i, k] != 0
        _add_rows(out[i], places, values, found, right, right.shape[1])


@kernel
def add_sparse_transposed(out: Array, left: Array, right: Array, first: Any, most: Any) -> None:
    """Add some rows of ``left.T @ right``, skipping the zeros of the left side.

    Parameters
    ----------
    out : float array, shape (rows, columns)
        The rows from `first` on.
    left : float array, shape (inner, at least first + rows)
    right : float array, shape (inner, columns)
        All are C-contiguous and of one dtype.
    first : int64
    most : int64
        So many columns of the first row are added to, and one more of each row after it, as in a lower triangle.
    """
    rows = out.shape[0]
    places, values = np.empty((rows, _LINES), np.int32), np.empty((rows, _LINES), left.dtype)
    found = np.empty(rows, np.int64)
    for above in range(0, left.shape[0], _LINES):
        found[:] = 0
        for k in range(above, min(above + _LINES, left.shape[0])):
            for i in range(rows):
                value = left[k, first + i]
                if value != 0:
                    places[i, found[i]], values[i, found[i]] = k, value
                    found[i] += 1
        for i in range(rows):
            _add_rows(out[i], places[i], values[i], found[i], right, min(most + i, right.shape[1]))


@helper
def _add_rows(out: Array, places: Array, values: Array, found: Any, right: Array, columns: Any) -> None:
    """Add so many multiples of rows, four at a time, since each turn reads and writes what they are added to."""
    whole = found - found % 4
    for n in range(0, whole, 4):
        a, b, c, d = places[n], places[n + 1], places[n + 2], places[n + 3]
        of_a, of_b, of_c, of_d = values[n], values[n + 1], values[n + 2], values[n + 3]
        for j in range(columns):
            out[j] += (of_a * right[a, j] + of_b * right[b, j]) + (of_c * right[c, j] + of_d * right[d, j])
    for n in range(whole, found):
        a, of_a = places[n], values[n]
        for j in range(columns):
            out[j] += of_a * right[a, j]
