"""Call the BLAS and LAPACK routines of SciPy so that other Python threads run meanwhile.

SciPy's own functions hold the interpreter's lock while they compute, which would leave one matrix at a time. The
routines behind them are published for compiled callers (`scipy.linalg.cython_blas`, `cython_lapack`) and are called
here through ctypes, which lets go of the lock.

BLAS sees C-contiguous arrays as their transposes: what is the lower triangle here is the upper one there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.errors import OptionError

Floats = NDArray[Any]
Matrix = tuple[bytes, int]
"""How BLAS reads an array: "N" as its transpose or "T" as it is, and the distance of its lines."""

_APART = 144
"""Elements between lines of a matrix."""
_ROWS = 512
"""Rows of a triangle that are copied at a time."""
_WORK = 64
"""Numbers of work space a row: LAPACK reduces as many columns at a time, or fewer."""
_REAL = {4: ("s", ctypes.c_float), 8: ("d", ctypes.c_double)}


def require_scipy() -> None:
    """Raise an OptionError if SciPy is missing, before a long run rather than after it."""
    try:
        import scipy.linalg  # noqa: F401
        import threadpoolctl  # noqa: F401
    except ImportError:
        raise OptionError(
            "spectra need SciPy and threadpoolctl, which are not installed", hint="pip install 'ckptdiff[spectra]'"
        ) from None


@cache
def _routine(library: str, name: str, arguments: int) -> Any:
    """A routine of SciPy's as a function of pointers."""
    # Cython keeps the address in a capsule, which is named after the routine's C declaration.
    capsule = ctypes.py_object(import_module(f"scipy.linalg.{library}").__pyx_capi__[name])
    pointer, python = ctypes.c_void_p, ctypes.pythonapi
    name_of = ctypes.PYFUNCTYPE(pointer, ctypes.py_object)(("PyCapsule_GetName", python))
    address_of = ctypes.PYFUNCTYPE(pointer, ctypes.py_object, pointer)(("PyCapsule_GetPointer", python))
    address = address_of(capsule, name_of(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)


def _call(library: str, name: str, *arguments: Any) -> None:
    """Call a routine with characters (bytes), integers, arrays and ctypes numbers, all passed by reference."""
    given = [_REFERENCE[type(argument)](argument) for argument in arguments]
    _routine(library, name, len(given))(*given)


@lru_cache(1 << 12)
def _integer(value: int) -> Any:
    """An integer that routines only read; matrices of one size ask for the same ones over and over."""
    return ctypes.pointer(ctypes.c_int(value))


_REFERENCE: dict[type, Callable[[Any], Any]] = {
    bytes: lambda text: text,
    int: _integer,
    np.ndarray: lambda array: array.__array_interface__["data"][0],
    ctypes.c_int: ctypes.byref,
    ctypes.c_float: ctypes.byref,
    ctypes.c_double: ctypes.byref,
}


def _seen(matrix: Floats) -> Matrix:
    size = matrix.itemsize
    if matrix.shape[1] == 1:  # NumPy may say anything of the distance of columns then
        return b"N", max(matrix.strides[0] // size, 1)
    if matrix.strides[1] == size:
        return b"N", max(matrix.strides[0] // size, matrix.shape[1], 1)
    if matrix.strides[0] == size:
        return b"T", max(matrix.strides[1] // size, matrix.shape[0], 1)
    raise ValueError(f"neither rows nor columns are contiguous: strides {matrix.strides}")


def add_product_block(out: Floats, left: Floats, right: Floats, *, keep: bool = True) -> None:
    """Add ``left @ right`` to `out`, or write it there if nothing is to be kept.

    All are float32 or float64; `out` has contiguous rows, the others contiguous rows or columns.
    """
    letter, real = _REAL[out.itemsize]
    (rows, columns), inner = out.shape, left.shape[1]
    (left_form, left_line), (right_form, right_line) = _seen(left), _seen(right)
    sizes = columns, rows, inner
    factors = real(1.0), right, right_line, left, left_line, real(float(keep))
    _call("cython_blas", f"{letter}gemm", right_form, left_form, *sizes, *factors, out, _seen(out)[1])


def add_gram_block(out: Floats, panel: Floats) -> None:
    """Add ``panel.T @ panel`` to the lower triangle of `out`, both float32 or float64 with contiguous rows."""
    letter, real = _REAL[out.itemsize]
    sizes = panel.shape[1], panel.shape[0]
    factors = real(1.0), panel, _seen(panel)[1], real(1.0)
    _call("cython_blas", f"{letter}syrk", b"U", b"N", *sizes, *factors, out, _seen(out)[1])


def solve_lower_block(factor: Floats, right: Floats) -> None:
    """Replace `right` by x with ``factor @ x = right`` for a lower triangular factor, both with contiguous rows."""
    letter, real = _REAL[right.itemsize]
    sizes = right.shape[1], right.shape[0]
    factors = real(1.0), factor, _seen(factor)[1]
    _call("cython_blas", f"{letter}trsm", b"R", b"U", b"N", b"N", *sizes, *factors, right, _seen(right)[1])


def eigh_part(matrix: Floats, first: int, last: int, *, vectors: bool = True) -> tuple[Floats, Floats]:
    """Some eigenpairs of a symmetric matrix, by bisection and inverse iteration or relatively robust representations.

    The lower triangle of the C-contiguous matrix is read, and all of it overwritten. Places `first` to `last`, both
    included, count in ascending order. Values are ascending too, and vectors are rows: shape (count, n), or (0, n) if
    none are asked for. Raises LinAlgError if LAPACK finds none.
    """
    letter, real = _REAL[matrix.itemsize]
    n, count = len(matrix), last - first + 1
    values = np.empty(n, matrix.dtype)
    found = np.empty((count if vectors else 0, n), matrix.dtype)
    support = np.empty(2 * n, np.int32)
    count_found, info = ctypes.c_int(0), ctypes.c_int(0)

    def run(work: Floats, work_size: int, whole: NDArray[np.int32], whole_size: int) -> None:
        how = b"V" if vectors else b"N", b"I" if count < n else b"A", b"U"
        asked = n, matrix, n, real(0), real(0), first + 1, last + 1, real(0)
        answer = count_found, values, found, n, support
        _call("cython_lapack", f"{letter}syevr", *how, *asked, *answer, work, work_size, whole, whole_size, info)

    _with_work(run, matrix.dtype, info)
    return values[:count], found


def eigh_all(matrix: Floats) -> tuple[Floats, Floats]:
    """All eigenpairs of a symmetric matrix, by divide and conquer.

    The lower triangle of the C-contiguous matrix is read; its memory holds the eigenvectors then, as rows. Values are
    ascending. Raises LinAlgError if LAPACK finds none.
    """
    letter, n = _REAL[matrix.itemsize][0], len(matrix)
    values, info = np.empty(n, matrix.dtype), ctypes.c_int(0)

    def run(work: Floats, work_size: int, whole: NDArray[np.int32], whole_size: int) -> None:
        sizes = work, work_size, whole, whole_size
        _call("cython_lapack", f"{letter}syevd", b"V", b"U", n, matrix, n, values, *sizes, info)

    _with_work(run, matrix.dtype, info)
    return values, matrix


def to_tridiagonal(matrix: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64], Floats, Floats]:
    """Reduce a symmetric matrix of which the lower triangle is read.

    Returns
    -------
    diagonal : float64 array, shape (n,)
    beside : float64 array, shape (n + 1,)
        The entries beside the diagonal, with a zero before them and one behind.
    sizes, reflections : arrays, shapes (n - 1,) and (n, n)
        The reflection of row i, from 1, is ``I - sizes[i - 1] v v^T``: v has a one at ``i - 1``, the entries of the row
        before that place, and zeros. The first turns an eigenvector of the tridiagonal matrix first.
    """
    letter, n = _REAL[matrix.itemsize][0], len(matrix)
    # Lines that are a power of two apart would share few places of the cache.
    lines = np.empty((n, n + _APART), matrix.dtype)
    for first in range(0, n, _ROWS):
        stop = min(first + _ROWS, n)
        lines[first:stop, :stop] = matrix[first:stop, :stop]
    diagonal, beside, sizes = np.empty(n, matrix.dtype), np.zeros(n + 1, matrix.dtype), np.empty(n, matrix.dtype)
    work, info = np.empty(_WORK * n, matrix.dtype), ctypes.c_int(0)
    found = diagonal, beside[1:], sizes
    _call("cython_lapack", f"{letter}sytrd", b"U", n, lines, n + _APART, *found, work, work.size, info)
    beside[n] = 0
    return diagonal.astype(np.float64), beside.astype(np.float64), sizes[:-1], lines


def eigh_of_tridiagonal(
    diagonal: NDArray[np.float64], beside: NDArray[np.float64], first: int, last: int
) -> tuple[NDArray[np.float64], Floats]:
    """Some eigenpairs of a tridiagonal matrix, by bisection and inverse iteration; vectors are float32 columns."""
    n, count = len(diagonal), last - first + 1
    diagonal, beside = diagonal.copy(), np.append(beside, 0.0)
    values, rows, support = np.empty(n), np.empty((count, n)), np.empty(2 * n, np.int32)
    count_found, info = ctypes.c_int(0), ctypes.c_int(0)
    real = ctypes.c_double

    def run(work: Floats, work_size: int, whole: NDArray[np.int32], whole_size: int) -> None:
        asked = n, diagonal, beside, real(0), real(0), first + 1, last + 1, real(0)
        answer = count_found, values, rows, n, support
        _call("cython_lapack", "dstevr", b"V", b"I", *asked, *answer, work, work_size, whole, whole_size, info)

    _with_work(run, np.dtype(np.float64), info)
    return values[:count], np.ascontiguousarray(rows.T, np.float32)


def _with_work(run: Any, dtype: Any, info: ctypes.c_int) -> None:
    """Ask a LAPACK routine for the size of its work space, then call it."""
    work, whole = np.empty(1, dtype), np.empty(1, np.int32)
    run(work, -1, whole, -1)
    # A float32 cannot name every size.
    size = int(work[0] * (1 + np.finfo(dtype).eps)) + 1
    run(np.empty(size, dtype), size, np.empty(int(whole[0]), np.int32), int(whole[0]))
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK found no eigenvalues: info {info.value}")
