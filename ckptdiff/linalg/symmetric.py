"""The two dense kernels that the spectra rest on: Gram matrices, and their leading eigenpairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import OptionError
from ckptdiff.linalg.passes import Array, Panel, Side, Stage, array_module

__all__ = [
    "add_gram",
    "eigenvalues",
    "eigh_bottom",
    "eigh_top",
    "gram_of",
    "require_scipy",
    "solve_lower",
    "whole",
]


def require_scipy() -> None:
    """Check that SciPy is installed, before a long run rather than after it.

    Raises
    ------
    OptionError
        If it is not.
    """
    try:
        import scipy.linalg  # noqa: F401
        import threadpoolctl  # noqa: F401
    except ImportError:
        raise OptionError(
            "spectra need SciPy and threadpoolctl, which are not installed", hint="pip install 'ckptdiff[spectra]'"
        ) from None


def add_gram(total: Array, panel: Array) -> None:
    """Add ``panel.T @ panel`` to the lower triangle of `total`, in place.

    Parameters
    ----------
    total : float array, shape (n, n), C-contiguous
    panel : float array, shape (rows, n), C-contiguous, of the same dtype
    """
    if array_module(panel) is not np:
        total += panel.T @ panel
        return
    from scipy.linalg import blas

    # BLAS sees the C-contiguous arrays as their transposes, so its upper triangle is the lower one here.
    rank_k = blas.ssyrk if panel.dtype == np.float32 else blas.dsyrk
    rank_k(1.0, panel.T, beta=1.0, c=total.T, overwrite_c=True)


def gram_of(side: Side, short: int, dtype: Any, xp: Any = np) -> Stage[Array]:
    """One pass: the Gram matrix ``A.T @ A`` of one side, lower triangle.

    Parameters
    ----------
    side : {"base", "delta", "tuned"}
    short : int
        Columns of A.
    dtype : dtype
        Of the products; panels are cast to it.
    """
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
        found = array_module(matrix).linalg.eigvalsh(matrix).get()
    else:
        import scipy.linalg

        found = scipy.linalg.eigh(matrix.T, lower=False, eigvals_only=True, driver="evr", check_finite=False)
    return np.asarray(found[::-1], np.float64)


def eigh_top(matrix: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest eigenpairs of a symmetric matrix given by its lower triangle; overwrites it.

    Returns
    -------
    values : array, shape (count,)
        Largest first.
    vectors : array, shape (n, count)
    """
    n = matrix.shape[0]
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
    import scipy.linalg

    # The transpose is the Fortran-ordered array that LAPACK works on in place.
    given: dict[str, Any] = {"lower": False, "overwrite_a": True, "check_finite": False}
    if 3 * (last - first) < matrix.shape[0]:
        # Inverse iteration is the quicker way to a part of the vectors.
        values, vectors = scipy.linalg.eigh(matrix.T, subset_by_index=(first, last), driver="evr", **given)
        return values, vectors
    # Divide and conquer is the quicker one to most of them, and the safe one among many equal eigenvalues.
    values, vectors = scipy.linalg.eigh(matrix.T, driver="evd", **given)
    return values[first : last + 1], vectors[:, first : last + 1]


def solve_lower(factor: Array, right: Array) -> Array:
    """Solve ``factor @ x = right`` for a lower triangular factor."""
    if array_module(factor) is np:
        from scipy.linalg import solve_triangular
    else:
        from cupyx.scipy.linalg import solve_triangular
    return solve_triangular(factor, right, lower=True, check_finite=False)
