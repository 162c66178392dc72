"""Make Gram matrices, and find their eigenpairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.stages import Panel, Side, Stage

_ROWS = 512
"""Rows of a triangle that are copied at a time."""


def gram_of(side: Side, short: int, dtype: Any, library: Library, stack: tuple[int, ...] = ()) -> Stage[Array]:
    """One pass: the Gram matrix ``A.T @ A`` of one side, lower triangle, shape (short, short), of the dtype given."""
    total = library.zeros((*stack, short, short), dtype)

    def add(panel: Panel) -> None:
        library.add_gram(total, library.cast(panel.side(side), dtype))

    yield add
    return total


def whole(lower: Array, library: Library) -> Array:
    """The symmetric matrix of a lower triangle, in float64."""
    triangle = library.cast(library.xp.tril(lower), np.float64)
    return triangle + library.xp.tril(triangle, k=-1).mT


def mirrored(lower: Array, library: Library) -> Array:
    """The same matrix with its upper triangle filled from the lower one, where it lies."""
    n = lower.shape[-1]
    for first in range(0, n, _ROWS):
        stop = min(first + _ROWS, n)
        corner = library.xp.tril(lower[first:stop, first:stop])
        lower[first:stop, first:stop] = corner + library.xp.tril(corner, k=-1).mT
        if stop < n:
            lower[first:stop, stop:] = lower[stop:, first:stop].mT
    return lower


def eigh_top(matrix: Array, count: int, library: Library) -> tuple[Array, Array]:
    """The `count` largest eigenpairs of a symmetric matrix given by its lower triangle; overwrites it.

    Values come largest first, vectors in shape (n, count).
    """
    xp, n = library.xp, matrix.shape[-1]
    values, vectors = library.eigenpairs(matrix, n - count, n - 1)
    return xp.flip(values, axis=-1), library.contiguous(xp.flip(vectors, axis=-1))


def first_of_each(
    vectors: Array, counts: NDArray[np.int64], dtype: np.dtype[Any], library: Library
) -> tuple[Array, Array]:
    """Of each matrix of a stack so many of its vectors and then zeros, and what makes a Gram matrix of those definite.

    That is ones, float64, in the places of its diagonal that are zero. There may be more matrices than counts; of
    those nothing is left.
    """
    room, _, rank = vectors.shape
    beyond = np.ones((room, 1, rank), bool)
    beyond[: len(counts), 0] = np.arange(rank) >= counts[:, None]
    kept, ones = library.put((~beyond).astype(dtype)), library.put(beyond.astype(np.float64))
    return vectors * kept, library.put(np.eye(rank)) * ones


def eigh_bottom(matrix: Array, count: int, library: Library) -> Array:
    """Eigenvectors of the `count` smallest eigenvalues, shape (n, count); overwrites the matrix."""
    return library.contiguous(library.eigenpairs(matrix, 0, count - 1)[1])
