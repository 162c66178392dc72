"""Make Gram matrices, and find their eigenpairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.stages import Panel, Side, Stage


def gram_of(side: Side, short: int, dtype: Any, library: Library) -> Stage[Array]:
    """One pass: the Gram matrix ``A.T @ A`` of one side, lower triangle, shape (short, short), of the dtype given."""
    total = library.zeros((short, short), dtype)

    def add(panel: Panel) -> None:
        library.add_gram(total, library.cast(panel.side(side), dtype))

    yield add
    return total


def whole(lower: Array, library: Library) -> Array:
    """The symmetric matrix of a lower triangle, in float64."""
    triangle = library.cast(library.xp.tril(lower), np.float64)
    return triangle + library.xp.tril(triangle, k=-1).T


def eigh_top(matrix: Array, count: int, library: Library) -> tuple[Array, Array]:
    """The `count` largest eigenpairs of a symmetric matrix given by its lower triangle; overwrites it.

    Values come largest first, vectors in shape (n, count).
    """
    xp, n = library.xp, matrix.shape[0]
    values, vectors = library.eigenpairs(matrix, n - count, n - 1)
    return xp.flip(values), library.contiguous(xp.flip(vectors, axis=1))


def eigh_bottom(matrix: Array, count: int, library: Library) -> Array:
    """Eigenvectors of the `count` smallest eigenvalues, shape (n, count); overwrites the matrix."""
    return library.contiguous(library.eigenpairs(matrix, 0, count - 1)[1])
