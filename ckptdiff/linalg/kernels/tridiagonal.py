"""Kernels for eigenpairs of symmetric tridiagonal matrices, many of them at a time in the lanes of the processor."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.jit import kernel
from ckptdiff.measure.kernels.tiles import Array

_LANES = 32
"""Vectors that are made at a time: what is kept of so many stays in the cache."""
_VANISHED = 1e-140
"""Entries of a vector below it are zero: numbers with fewer digits take the processor a hundred times as long."""


@kernel
def count_below(diagonal: Array, squares: Array, least: Any, shifts: Array, counts: Array) -> None:
    """Count the eigenvalues below each of some numbers, by the signs of pivots (Sturm sequences; Kahan 1966).

    Parameters
    ----------
    diagonal : float64 array, shape (n,)
    squares : float64 array, shape (n,)
        Of the entry beside the diagonal before each row; the first is 0.
    least : float64
        Pivots of a smaller magnitude become minus this.
    shifts : float64 array, shape (count,)
    counts : float64 array, shape (count,)
        Written to.
    """
    pivots = np.ones_like(shifts)
    counts[:] = 0.0
    for i in range(diagonal.size):
        entry, square = diagonal[i], squares[i]
        for k in range(shifts.size):
            pivot = entry - shifts[k] - square / pivots[k]
            pivot = -least if abs(pivot) < least else pivot
            pivots[k] = pivot
            counts[k] += 1.0 if pivot < 0 else 0.0


@kernel
def vectors_near(diagonal: Array, beside: Array, least: Any, values: Array, vectors: Array, residuals: Array) -> None:
    """Find unit vectors for eigenvalues that are known, by twisted factorizations (Dhillon and Parlett 2004).

    Pivots from both ends meet in the row where a vector is large: it has a one there, and no other row of
    ``(T - value) vector`` differs from zero.

    Parameters
    ----------
    diagonal : float64 array, shape (n,)
    beside : float64 array, shape (n + 1,)
        The entry beside the diagonal before each row; the first and the last are 0.
    least : float64
        Pivots of a smaller magnitude become minus this.
    values : float64 array, shape (count,)
    vectors : float32 array, shape (n, count)
        Written to.
    residuals : float64 array, shape (count,)
        Written to: the norm of ``(T - value) vector``.
    """
    n = diagonal.size
    above, below = np.empty((n, _LANES)), np.empty((n, _LANES))
    for first in range(0, values.size, _LANES):
        lanes = min(_LANES, values.size - first)
        shifts = values[first : first + lanes]
        pivots = np.ones(lanes)
        for i in range(n):
            entry, square = diagonal[i], beside[i] * beside[i]
            for k in range(lanes):
                pivot = entry - shifts[k] - square / pivots[k]
                pivot = -least if abs(pivot) < least else pivot
                pivots[k] = above[i, k] = pivot
        smallest, twists = np.full(lanes, np.inf), np.zeros(lanes)
        pivots[:] = 1.0
        for i in range(n - 1, -1, -1):
            entry, square, row = diagonal[i], beside[i + 1] * beside[i + 1], float(i)
            for k in range(lanes):
                shifted = entry - shifts[k]
                pivot = shifted - square / pivots[k]
                pivot = -least if abs(pivot) < least else pivot
                pivots[k] = below[i, k] = pivot
                met = abs(above[i, k] + pivot - shifted)
                twists[k] = row if met < smallest[k] else twists[k]
                smallest[k] = min(met, smallest[k])
        norms = np.ones(lanes)
        last = np.zeros(lanes)
        for i in range(n - 1, -1, -1):
            entry, row = beside[i + 1], float(i)
            for k in range(lanes):
                value = -entry * last[k] / above[i, k]
                value = 0.0 if abs(value) < _VANISHED else value
                value = 1.0 if row == twists[k] else value
                norms[k] += value * value if row < twists[k] else 0.0
                last[k] = above[i, k] = value
        last[:] = 0.0
        for i in range(n):
            entry, row = beside[i], float(i)
            for k in range(lanes):
                value = -entry * last[k] / below[i, k]
                value = 0.0 if abs(value) < _VANISHED else value
                value = value if row > twists[k] else above[i, k]
                norms[k] += value * value if row > twists[k] else 0.0
                last[k] = above[i, k] = value
        for k in range(lanes):
            norms[k] = 1.0 / np.sqrt(norms[k])
            residuals[first + k] = smallest[k] * norms[k]
        for i in range(n):
            for k in range(lanes):
                vectors[i, first + k] = above[i, k] * norms[k]
