"""Make Gram matrices, and find their eigenpairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.blas import eigh_all, eigh_part, solve_lower_block
from ckptdiff.linalg.products import add_gram, product_work
from ckptdiff.linalg.stages import Array, Panel, Side, Stage, array_module, on_host
from ckptdiff.linalg.threads import counted


def gram_of(side: Side, short: int, dtype: Any, xp: Any = np) -> Stage[Array]:
    """One pass: the Gram matrix ``A.T @ A`` of one side, lower triangle, shape (short, short), of the dtype given."""
    total = xp.zeros((short, short), dtype)

    def add(panel: Panel) -> None:
        add_gram(total, panel.side(side).astype(dtype, copy=False))

    yield add
    return total


def whole(lower: Array) -> Array:
    """The symmetric matrix of a lower triangle, in float64."""
    xp = array_module(lower)
    triangle = xp.tril(lower).astype(np.float64)
    return triangle + xp.tril(triangle, -1).T


def eigenvalues(matrix: Array) -> NDArray[np.float64]:
    """All eigenvalues of a symmetric matrix given by its lower triangle, largest first, on the host."""
    if array_module(matrix) is not np:
        found = on_host(array_module(matrix).linalg.eigvalsh(matrix))
    else:
        with counted(eigenvalues_work(len(matrix), matrix.itemsize), opaque=True):
            found, _ = eigh_part(matrix.copy(), 0, len(matrix) - 1, vectors=False)
    return np.asarray(found[::-1], np.float64)


def eigh_top(matrix: Array, count: int, *, with_vectors: bool = True) -> tuple[Array, Array]:
    """The `count` largest eigenpairs of a symmetric matrix given by its lower triangle; overwrites it.

    Values come largest first, vectors in shape (n, count), or (n, 0) if none are asked for.
    """
    n = matrix.shape[0]
    if not with_vectors:
        return eigenvalues(matrix)[:count], array_module(matrix).empty((n, 0), matrix.dtype)
    values, vectors = _eigh(matrix, n - count, n - 1)
    return values[::-1], array_module(vectors).ascontiguousarray(vectors[:, ::-1])


def eigh_bottom(matrix: Array, count: int) -> Array:
    """Eigenvectors of the `count` smallest eigenvalues, shape (n, count); overwrites the matrix."""
    vectors = _eigh(matrix, 0, count - 1)[1]
    return array_module(vectors).ascontiguousarray(vectors)


def _eigh(matrix: Array, first: int, last: int) -> tuple[Array, Array]:
    """Eigenpairs by their place in ascending order."""
    xp = array_module(matrix)
    if xp is not np:
        values, vectors = xp.linalg.eigh(matrix)
        return values[first : last + 1], vectors[:, first : last + 1]
    with counted(eigenpairs_work(len(matrix), last - first + 1, matrix.itemsize), opaque=True):
        if _few(last - first + 1, len(matrix)):
            # Inverse iteration is the quicker way to a part of the vectors.
            values, rows = eigh_part(matrix, first, last)
            return values, rows.T
        # Divide and conquer is the quicker one to most of them, and the safe one among many equal eigenvalues.
        values, rows = eigh_all(matrix)
        return values[first : last + 1], rows[first : last + 1].T


def _few(count: int, n: int) -> bool:
    return 3 * (count - 1) < n


def eigenvalues_work(n: int, itemsize: int) -> float:
    """The work of all eigenvalues of a matrix of `n` rows; as all work here, as measured from 256 rows to 2,048."""
    return (1.5 * n + 700) * n**2 * itemsize / 4


def eigenpairs_work(n: int, count: int, itemsize: int) -> float:
    """The work of `count` eigenpairs of a matrix of `n` rows."""
    if _few(count, n):
        return eigenvalues_work(n, itemsize) + 5 * count * n**2 * itemsize / 4
    return (4.5 * n + 700) * n**2 * itemsize / 4


def solve_lower(factor: Array, right: Array) -> Array:
    """Solve ``factor @ x = right``, shape (n, k), for a lower triangular factor, shape (n, n)."""
    if array_module(factor) is not np:
        from cupyx.scipy.linalg import solve_triangular

        return solve_triangular(factor, right, lower=True, check_finite=False)
    found = np.array(right, order="C")
    with counted(product_work(len(factor) / 2, len(factor), right.shape[1], found.itemsize)):
        solve_lower_block(np.ascontiguousarray(factor), found)
    return found
