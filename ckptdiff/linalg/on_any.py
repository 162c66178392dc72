"""Compute with any library that follows the array API standard, in nothing but what the standard has."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Windows
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.threads import counted, end_if_stopped
from ckptdiff.linalg.work import eigenpairs_work, eigenvalues_work, gram_work, product_work
from ckptdiff.options import default_threads


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
        *rows, inner = left.shape
        with counted(product_work(math.prod(rows), inner, right.shape[-1], self.itemsize(left))):
            return left @ right

    def add_product(self, out: Array, left: Array, right: Array) -> None:
        """Add ``left @ right``."""
        out += self.product(left, right)

    def add_gram(self, total: Array, panel: Array) -> None:
        """Add ``panel.T @ panel``, all of it."""
        end_if_stopped()
        *rows, columns = panel.shape
        with counted(gram_work(math.prod(rows), columns, self.itemsize(panel))):
            total += panel.mT @ panel

    def nonzeros(self) -> None:
        """None: the standard has no sparse arrays."""

    def squares(self, values: Array, *, by_column: bool = False) -> Array:
        """Sum of squares."""
        wide = self.cast(values, np.float64)
        return self.xp.sum(wide * wide, axis=-2 if by_column else (-2, -1))

    def scaled(self, values: Array, exponent: int) -> Array:
        """``values * 2**exponent``, in two steps, since the power may be out of range where neither end is."""
        half = exponent // 2
        return values * 2.0**half * 2.0 ** (exponent - half)

    def eigenvalues(self, matrix: Array) -> NDArray[np.float64]:
        """All eigenvalues, largest first."""
        if self._at_home(matrix):
            return NUMPY.eigenvalues(self.home(matrix))
        work = eigenvalues_work(matrix.shape[-1], self.itemsize(matrix))
        with counted(math.prod(matrix.shape[:-2]) * work, opaque=True):
            return self.home(self._eigenvalues(matrix))[..., ::-1].astype(np.float64)

    def eigenpairs(self, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
        """Some eigenpairs."""
        if self._at_home(matrix):
            values, vectors = NUMPY.eigenpairs(self.home(matrix), first, last)
            return self.put(values), self.put(vectors)
        work = eigenpairs_work(matrix.shape[-1], last - first + 1, self.itemsize(matrix))
        with counted(math.prod(matrix.shape[:-2]) * work, opaque=True):
            return self._eigenpairs(matrix, first, last)

    def singular_values(self, matrix: Array) -> NDArray[Any]:
        """All singular values, which are those of R in ``matrix = QR``; those of a stack on all cores of the host."""
        small = self.home(self.xp.linalg.qr(matrix)[1])
        if small.ndim == 2:
            return NUMPY.singular_values(small)
        with ThreadPoolExecutor(default_threads()) as pool:
            return np.stack(list(pool.map(NUMPY.singular_values, small)))

    def solve_lower(self, factor: Array, right: Array) -> Array:
        """Solve ``factor @ x = right``."""
        *rows, n = factor.shape
        with counted(product_work(math.prod(rows) / 2, n, right.shape[-1], self.itemsize(right))):
            return self._solved(factor, right)

    def count_magnitudes(self, counts: Any, base: Array, delta: Array, threshold: float) -> Any:
        """Count by magnitude, on the host: the standard knows neither histograms nor the bits of a number."""
        sides = list(zip(self._matrices(base), self._matrices(delta), strict=True))
        before = counts or [None] * len(sides)
        return [NUMPY.count_magnitudes(held, *pair, threshold) for held, pair in zip(before, sides, strict=True)]

    def magnitudes(self, counts: Any) -> list[NDArray[np.int64]]:
        """What was counted."""
        return [found for held in counts for found in NUMPY.magnitudes(held)]

    def count_scores(
        self, counts: Any, scores: Array, base: Array, delta: Array, windows: Windows, threshold: float
    ) -> Any:
        """Count by score, likewise."""
        filled = slice(len(windows))
        sides = (self._matrices(side)[filled] for side in (scores, base, delta))
        return [
            NUMPY.count_scores(held, values, weights, changes, [window], threshold) if window else None
            for held, values, weights, changes, window in zip(
                counts or [None] * len(windows), *sides, windows, strict=True
            )
        ]

    def scores(self, counts: Any, windows: Windows) -> list[NDArray[np.float64]]:
        """What was counted."""
        return list(counts)

    def _matrices(self, values: Array) -> NDArray[Any]:
        """Those of a stack, or the one that there is, on the host."""
        return self.home(values).reshape(-1, *values.shape[-2:])

    def _at_home(self, matrix: Array) -> bool:
        """Whether the host is quicker to solve a problem; it has nothing to set against many at a time."""
        return len(matrix.shape) == 2 and matrix.shape[0] <= self.host_rows

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
        return values[..., first : last + 1], vectors[..., first : last + 1]

    def _solved(self, factor: Array, right: Array) -> Array:
        return self.xp.linalg.solve(factor, right)
