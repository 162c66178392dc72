"""Find some eigenpairs of a float32 matrix, each by itself, from its tridiagonal form in float64.

LAPACK makes that form in float32. What follows costs it as much again: it finds eigenvalues one by one, and makes each
vector orthogonal to those of near eigenvalues. In float64 a vector is good to ``2 r / gap``, where r is its residual,
and that is far below float32's rounding unless two eigenvalues all but coincide. Then many can be found at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.blas import (
    add_gram_block,
    add_product_block,
    eigh_of_tridiagonal,
    solve_lower_block,
    to_tridiagonal,
)
from ckptdiff.linalg.kernels.tridiagonal import count_below, vectors_near

Floats = NDArray[Any]
Float64 = NDArray[np.float64]

_HALVINGS = 50
"""Of the range of all eigenvalues: its rounding in float64 is two to the minus 52."""
_SMALLEST_PIVOT, _SMALLEST_MET = 1e-290, 1e-30
"""As shares of the largest magnitude: of pivots that are counted, and of those that vectors are made of."""
_ORTHOGONAL = 1e-6
"""Inner product of two vectors up to which they are left as they are."""
_INDEPENDENT = 0.5
"""What is left of each vector, at least, without the part along those before."""
_TURNS = 128
"""Reflections that are applied at a time, as products."""


def eigh_separate(matrix: Floats, first: int, last: int) -> tuple[Floats, Floats]:
    """Some eigenpairs of a symmetric float32 matrix, given by its lower triangle.

    Places `first` to `last`, both included, count in ascending order. Values are ascending too; vectors are columns,
    shape (n, count). Raises LinAlgError if there are none to be found.
    """
    diagonal, beside, sizes, reflections = to_tridiagonal(matrix)
    if not (np.isfinite(diagonal).all() and np.isfinite(beside).all()):
        raise np.linalg.LinAlgError("NaN or values out of range in the matrix")
    found = pairs_of_tridiagonal(diagonal, beside, first, last)
    values, vectors = eigh_of_tridiagonal(diagonal, beside[1:-1], first, last) if found is None else found
    _turn_back(vectors, reflections, sizes)
    return values.astype(np.float32), vectors


def pairs_of_tridiagonal(diagonal: Float64, beside: Float64, first: int, last: int) -> tuple[Float64, Floats] | None:
    """Eigenpairs of a tridiagonal matrix, as :func:`eigh_separate` returns them; None if some are not independent.

    The entries beside the diagonal have a zero before and one behind.
    """
    reach = abs(beside[:-1]) + abs(beside[1:])  # of Gershgorin's circles
    bounds = float((diagonal - reach).min()), float((diagonal + reach).max())
    scale, count = max(abs(bounds[0]), abs(bounds[1])), last - first + 1
    if not scale > 0:
        return None
    low, high = (np.full(count, bound) for bound in bounds)
    places, below, squares = np.arange(first, last + 1), np.empty(count), beside[:-1] ** 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        count_below(diagonal, squares, _SMALLEST_PIVOT * scale, middle, below)
        beyond = below <= places
        low[beyond], high[~beyond] = middle[beyond], middle[~beyond]
    values = (low + high) / 2
    vectors, residuals = np.empty((len(diagonal), count), np.float32), np.empty(count)
    vectors_near(diagonal, beside, _SMALLEST_MET * scale, values, vectors, residuals)
    if np.all(residuals[1:] + residuals[:-1] < _ORTHOGONAL * np.diff(values)):
        return values, vectors
    gram = np.zeros((count, count), np.float32)
    add_gram_block(gram, vectors)
    try:
        factor = np.linalg.cholesky(gram)  # of its lower triangle
    except np.linalg.LinAlgError:
        return None
    if not factor.diagonal().min() > _INDEPENDENT:
        return None
    orthonormal = np.empty_like(vectors)
    add_product_block(orthonormal, vectors, np.linalg.inv(factor).T, keep=False)
    return values, orthonormal


def _turn_back(vectors: Floats, reflections: Floats, sizes: Floats) -> None:
    """Multiply vectors, columns, by the reflections that made a matrix tridiagonal, the first of them first.

    A product of reflections is I - V^T T V with their directions as rows of V and T^-1 the upper triangle of V V^T,
    whose diagonal holds one over their sizes (Schreiber and Van Loan 1989; Puglisi 1992).
    """
    for first in range(1, len(vectors), _TURNS):
        stop = min(first + _TURNS, len(vectors))
        directions = np.tril(reflections[first:stop, : stop - 1], first - 2)
        rows = np.arange(stop - first)
        directions[rows, rows + first - 1] = 1.0
        met = np.empty((len(rows), len(rows)), np.float32)
        add_product_block(met, directions, directions.T, keep=False)
        size = sizes[first - 1 : stop - 1]
        directions[size == 0] = 0.0
        met[rows, rows] = 1 / np.where(size == 0, 1.0, size)
        along = np.empty((len(rows), vectors.shape[1]), np.float32)
        add_product_block(along, directions, vectors[: stop - 1], keep=False)
        solve_lower_block(np.tril(met), along)
        np.negative(along, out=along)
        add_product_block(vectors[: stop - 1], directions.T, along)
