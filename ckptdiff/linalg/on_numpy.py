"""Compute with NumPy and SciPy on the host: products in parts that the threads of a matrix share, LAPACK's routines.

The parts depend on the sizes alone, so that no digit depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.blas import add_gram_block, add_product_block, eigh_all, eigh_part, solve_lower_block
from ckptdiff.linalg.kernels.scores import add_squares, count_magnitudes, count_scores
from ckptdiff.linalg.library import MAGNITUDES, SCORE_LANES, Library, Windows
from ckptdiff.linalg.nonzeros import MOST_LISTED, Nonzeros, add_sparse_product
from ckptdiff.linalg.pair_products import add_pair_gram, multiplies_pairs
from ckptdiff.linalg.separate_pairs import eigh_separate
from ckptdiff.linalg.threads import counted, cuts, in_parts
from ckptdiff.linalg.work import eigenpairs_work, eigenvalues_work, few_of, gram_work, product_work

Floats = NDArray[Any]

_SMALLEST_PART, _GRAM_PART = 512, 1024
"""Columns of a part of a Gram matrix, of one that is cut in two, and at least of larger ones: BLAS is the quicker the
larger they are."""
_SPARSE = 5
"""Where one of so many entries is not zero, or fewer, zeros are skipped."""
_SMALLEST_SPARSE, _LOOKED_AT = 1 << 16, 32
"""Entries of a matrix in which it is worth while, and how many rows are looked at."""


class NumpyLibrary:
    """NumPy and SciPy; see :class:`~ckptdiff.linalg.library.Library`."""

    xp = np
    at_once = False
    lanes = SCORE_LANES

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Floats:
        """Zeros of a dtype."""
        return np.zeros(shape, dtype)

    def put(self, values: Floats) -> Floats:
        """The array itself."""
        return values

    def home(self, values: Any) -> Floats:
        """The array itself."""
        return np.asarray(values)

    def cast(self, values: Floats, dtype: Any) -> Floats:
        """The same values in a dtype."""
        return values.astype(dtype, copy=False)

    def contiguous(self, values: Floats) -> Floats:
        """The same values row by row."""
        return np.ascontiguousarray(values)

    def product(self, left: Floats, right: Floats) -> Floats:
        """``left @ right``."""
        out = np.empty((left.shape[0], right.shape[1]), left.dtype)
        _products(out, left, right, keep=False)
        return out

    def add_product(self, out: Floats, left: Floats, right: Floats) -> None:
        """Add ``left @ right``."""
        _products(out, left, right, keep=True)

    def add_gram(self, total: Floats, panel: Floats) -> None:
        """Add ``panel.T @ panel`` to the lower triangle."""
        work = gram_work(len(panel), panel.shape[1], panel.itemsize)
        if _mostly_zero(panel, total):
            add_sparse_product(total, panel.T, panel, work, triangle=True)
            return
        if panel.dtype == np.float32 and multiplies_pairs() and add_pair_gram(total, panel, work):
            return
        n = panel.shape[1]
        at = cuts(n, min(max(n // 2, _SMALLEST_PART), _GRAM_PART))
        blocks = range(len(at) - 1)
        # Those beside the diagonal take twice as long, and come first.
        pairs = sorted(((i, j) for i in blocks for j in range(i + 1)), key=lambda pair: pair[0] == pair[1])

        def add(part: int) -> None:
            rows, columns = (slice(at[k], at[k + 1]) for k in pairs[part])
            if rows == columns:
                add_gram_block(total[rows, rows], panel[:, rows])
            else:
                add_product_block(total[rows, columns], panel[:, rows].T, panel[:, columns])

        in_parts(add, len(pairs), work)

    def nonzeros(self) -> Nonzeros | None:
        """Room for the entries of an update that are not zero."""
        return Nonzeros()

    def squares(self, values: Floats, *, by_column: bool = False) -> Any:
        """Sum of squares."""
        if by_column:
            return np.einsum("ij,ij->j", values, values, dtype=np.float64)
        total = np.zeros(1)
        add_squares(values.reshape(-1), total)
        return total[0]

    def scaled(self, values: Floats, exponent: int) -> Floats:
        """``values * 2**exponent``."""
        scaled: Floats = np.ldexp(values, exponent)
        return scaled

    def eigenvalues(self, matrix: Floats) -> NDArray[np.float64]:
        """All eigenvalues, largest first."""
        with counted(eigenvalues_work(len(matrix), matrix.itemsize), opaque=True):
            found, _ = eigh_part(matrix.copy(), 0, len(matrix) - 1, vectors=False)
        return np.asarray(found[::-1], np.float64)

    def eigenpairs(self, matrix: Floats, first: int, last: int) -> tuple[Floats, Floats]:
        """Some eigenpairs."""
        count, n = last - first + 1, len(matrix)
        with counted(eigenpairs_work(n, count, matrix.itemsize), opaque=True):
            if few_of(count, n) and matrix.itemsize == 4:
                return eigh_separate(matrix, first, last)
            if few_of(count, n):
                # Inverse iteration is the quicker way to a part of the vectors.
                values, rows = eigh_part(matrix, first, last)
                return values, rows.T
            # Divide and conquer is the quicker one to most of them, and the safe one among many equal eigenvalues.
            values, rows = eigh_all(matrix)
            return values[first : last + 1], rows[first : last + 1].T

    def singular_values(self, matrix: Floats) -> Floats:
        """All singular values."""
        values: Floats = np.linalg.svd(matrix, compute_uv=False)
        return values

    def solve_lower(self, factor: Floats, right: Floats) -> Floats:
        """Solve ``factor @ x = right``."""
        found = np.array(right, order="C")
        with counted(product_work(len(factor) / 2, len(factor), right.shape[1], found.itemsize)):
            solve_lower_block(np.ascontiguousarray(factor), found)
        return found

    def count_magnitudes(self, counts: Any, base: Floats, delta: Floats, threshold: float) -> Any:
        """Count by magnitude, in the compiled loop."""
        held = np.zeros((3, MAGNITUDES), np.int64) if counts is None else counts
        with np.errstate(over="ignore"):  # infinite in float32, where it is as large and as changed
            base, delta = base.astype(np.float32, copy=False), delta.astype(np.float32, copy=False)
        count_magnitudes(base.view(np.uint32), delta, np.float32(threshold), held)
        return held

    def magnitudes(self, counts: Any) -> list[NDArray[np.int64]]:
        """What was counted."""
        return [counts]

    def count_scores(
        self, counts: Any, scores: Floats, base: Floats, delta: Floats, windows: Windows, threshold: float
    ) -> Any:
        """Count by score, in the compiled loop."""
        (window,) = windows
        assert window is not None
        if counts is None:
            counts = np.zeros((window.bins + 1, 6))
        singles = (side.astype(np.float32, copy=False).reshape(-1) for side in (scores, base, delta))
        values, weights, changes = singles
        count_scores(
            values.view(np.uint32),
            weights.view(np.uint32),
            changes,
            window.chances,
            (np.uint32(window.shift), np.uint32(window.start)),
            (np.uint32(window.low[0]), window.low[1]),
            np.float32(threshold),
            counts,
        )
        return counts

    def scores(self, counts: Any, windows: Windows) -> list[NDArray[np.float64]]:
        """What was counted."""
        return [counts]


def _products(out: Floats, left: Floats, right: Floats, *, keep: bool) -> None:
    work = product_work(len(left), len(right), len(right.T), out.itemsize)
    if _mostly_zero(left if left.flags.c_contiguous else left.T, out, right):
        if not keep:
            out[:] = 0
        add_sparse_product(out, left, right, work)
        return
    at = cuts(len(out))

    def add(part: int) -> None:
        first, stop = at[part], at[part + 1]
        add_product_block(out[first:stop], left[first:stop], right, keep=keep)

    in_parts(add, len(at) - 1, work)


def _mostly_zero(values: Floats, *others: Floats) -> bool:
    """Whether a product is quicker that skips the zeros of an array, as some of its rows tell; all are C-contiguous."""
    if values.size < _SMALLEST_SPARSE or max(values.shape) > MOST_LISTED:
        return False
    if not all(each.flags.c_contiguous for each in (values, *others)):
        return False
    some = values[:: -(-len(values) // _LOOKED_AT)]
    return bool(np.count_nonzero(some) * _SPARSE < some.size)


NUMPY: Library = NumpyLibrary()
