"""Compute with any library that follows the array API standard, in nothing but what the standard has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, ScoreWindow
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.threads import counted, end_if_stopped
from ckptdiff.linalg.work import eigenpairs_work, eigenvalues_work, gram_work, product_work


@dataclass(frozen=True, slots=True)
class AnyLibrary:
    """A library on one of its devices; see :class:`~ckptdiff.linalg.library.Library`."""

    xp: Any
    device: Any
    host_rows: int = 512
    """Eigenproblems of so many rows are solved on the host."""
    at_once: ClassVar[bool] = True
    lanes: ClassVar[int] = 1

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeros of a NumPy dtype."""
        return self.xp.zeros(shape, dtype=self._dtype(dtype), device=self.device)

    def put(self, values: NDArray[Any]) -> Array:
        """A small array of the host, on the device."""
        return self.xp.asarray(np.ascontiguousarray(values), device=self.device)

    def home(self, values: Array) -> NDArray[Any]:
        """A small array, on the host."""
        return np.array(np.from_dlpack(values))

    def cast(self, values: Array, dtype: Any) -> Array:
        """The same values in a NumPy dtype."""
        return self.xp.astype(values, self._dtype(dtype), copy=False)

    def contiguous(self, values: Array) -> Array:
        """The array itself: the standard knows no order in memory."""
        return values

    def product(self, left: Array, right: Array) -> Array:
        """``left @ right``."""
        end_if_stopped()
        rows, inner = left.shape
        with counted(product_work(rows, inner, right.shape[1], self.itemsize(left))):
            return left @ right

    def add_product(self, out: Array, left: Array, right: Array) -> None:
        """Add ``left @ right``."""
        out += self.product(left, right)

    def add_gram(self, total: Array, panel: Array) -> None:
        """Add ``panel.T @ panel``, all of it."""
        end_if_stopped()
        rows, columns = panel.shape
        with counted(gram_work(rows, columns, self.itemsize(panel))):
            total += panel.T @ panel

    def squares(self, values: Array, axis: int | None = None) -> Array:
        """Sum of squares."""
        wide = self.cast(values, np.float64)
        return self.xp.sum(wide * wide, axis=axis)

    def scaled(self, values: Array, exponent: int) -> Array:
        """``values * 2**exponent``, in two steps, since the power may be out of range where neither end is."""
        half = exponent // 2
        return values * 2.0**half * 2.0 ** (exponent - half)

    def eigenvalues(self, matrix: Array) -> NDArray[np.float64]:
        """All eigenvalues, largest first."""
        if matrix.shape[0] <= self.host_rows:
            return NUMPY.eigenvalues(self.home(matrix))
        with counted(eigenvalues_work(matrix.shape[0], self.itemsize(matrix)), opaque=True):
            return self.home(self._eigenvalues(matrix))[::-1].astype(np.float64)

    def eigenpairs(self, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
        """Some eigenpairs."""
        if matrix.shape[0] <= self.host_rows:
            values, vectors = NUMPY.eigenpairs(self.home(matrix), first, last)
            return self.put(values), self.put(vectors)
        with counted(eigenpairs_work(matrix.shape[0], last - first + 1, self.itemsize(matrix)), opaque=True):
            return self._eigenpairs(matrix, first, last)

    def singular_values(self, matrix: Array) -> NDArray[Any]:
        """All singular values, which are those of R in ``matrix = QR``."""
        return NUMPY.singular_values(self.home(self.xp.linalg.qr(matrix)[1]))

    def solve_lower(self, factor: Array, right: Array) -> Array:
        """Solve ``factor @ x = right``."""
        n = factor.shape[0]
        with counted(product_work(n / 2, n, right.shape[1], self.itemsize(right))):
            return self._solved(factor, right)

    def count_magnitudes(self, counts: Any, base: Array, delta: Array, threshold: float) -> Any:
        """Count by magnitude, on the host: the standard knows neither histograms nor the bits of a number."""
        return NUMPY.count_magnitudes(counts, self.home(base), self.home(delta), threshold)

    def magnitudes(self, counts: Any) -> NDArray[np.int64]:
        """What was counted."""
        return NUMPY.magnitudes(counts)

    def count_scores(
        self, counts: Any, scores: Array, base: Array, delta: Array, window: ScoreWindow, threshold: float
    ) -> Any:
        """Count by score, likewise."""
        return NUMPY.count_scores(counts, self.home(scores), self.home(base), self.home(delta), window, threshold)

    def scores(self, counts: Any, window: ScoreWindow) -> NDArray[np.float64]:
        """What was counted."""
        return NUMPY.scores(counts, window)

    def itemsize(self, values: Array) -> int:
        """Bytes of an element, of float32 or float64."""
        return 4 if values.dtype == self._dtype(np.float32) else 8

    def _dtype(self, dtype: Any) -> Any:
        return getattr(self.xp, np.dtype(dtype).name)

    def _eigenvalues(self, matrix: Array) -> Array:
        """In ascending order, on the device."""
        return self.xp.linalg.eigvalsh(matrix)

    def _eigenpairs(self, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
        values, vectors = self.xp.linalg.eigh(matrix)
        return values[first : last + 1], vectors[:, first : last + 1]

    def _solved(self, factor: Array, right: Array) -> Array:
        return self.xp.linalg.solve(factor, right)
