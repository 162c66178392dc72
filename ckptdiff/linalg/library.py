"""Name what a library of arrays does for the stages beyond the array API standard, and find the library of an array.

Stages are written once. What they do to large arrays is said in the calls that the standard, NumPy and CuPy share
(`xp`), or, where a library has something much better, by a method here. What is small (a few hundred rows) they bring
home and compute with NumPy: no GPU is quicker there. Many small matrices of a shape lie in one array, a stack, with an
axis more in front, and are computed by the same calls; NumPy's library does without, since it would gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.nonzeros import Nonzeros

Array: TypeAlias = Any
"""An array of some library, on the device that this library keeps it on."""

SCORE_LANES = 4
"""Parts of a panel that are counted apart, at most. Their sums are added in order, whichever threads made them."""

Counts: TypeAlias = Any
"""What a library counts into."""

MAGNITUDES = 1 << 15
"""Bins of |W0|: the leading 15 magnitude bits of its float32, which are all that bfloat16 has."""


@dataclass(frozen=True, slots=True)
class ScoreWindow:
    """The bins that a pass counts scores in."""

    shift: int
    """Bits that the float32 code of a score is shifted right by, its sign left out, to make a bin of it."""
    start: int
    """Of bin 0. Scores below are left out, and those above all bins share one more."""
    bins: int
    low: tuple[int, float]
    """Magnitude of W0 at which the smallest end, and which share of the entries there is not among them."""
    chances: NDArray[np.float64]
    """By magnitude of W0, the chance to be changed under the null; shape (32768,)."""


Windows: TypeAlias = Sequence[ScoreWindow | None]
"""One for each matrix, or None where nothing is to be counted."""


class Library(Protocol):
    """NumPy with SciPy, CuPy, or any other library that follows the standard."""

    @property
    def xp(self) -> Any:
        """Its namespace."""

    @property
    def at_once(self) -> bool:
        """Whether all eigenpairs take hardly longer than all eigenvalues and a part of the pairs."""

    @property
    def lanes(self) -> int:
        """Parts of a panel whose scores are counted at a time, a power of two of at most ``SCORE_LANES``."""

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Zeros of a NumPy dtype, C-contiguous."""

    def put(self, values: NDArray[Any]) -> Array:
        """A small array of the host, on the device."""

    def home(self, values: Array) -> NDArray[Any]:
        """A small array, on the host; the only way there."""

    def cast(self, values: Array, dtype: Any) -> Array:
        """The same values in a NumPy dtype, not copied if they have it."""

    def contiguous(self, values: Array) -> Array:
        """The same values row by row, not copied if they are."""

    def product(self, left: Array, right: Array) -> Array:
        """``left @ right``, float arrays of one dtype, shapes (m, k) and (k, n), with contiguous rows or columns."""

    def add_product(self, out: Array, left: Array, right: Array) -> None:
        """Add ``left @ right``, as in :meth:`product`, to `out`, a C-contiguous array of shape (m, n)."""

    def add_gram(self, total: Array, panel: Array) -> None:
        """Add ``panel.T @ panel`` to the lower triangle of `total`: C-contiguous, shapes (rows, n) and (n, n)."""

    def nonzeros(self) -> Nonzeros | None:
        """Room for the entries of an update that are not zero; None if products with them are no quicker there."""

    def squares(self, values: Array, *, by_column: bool = False) -> Array:
        """Sum of squares of a C-contiguous matrix in float64, over all of it or of each column."""

    def scaled(self, values: Array, exponent: int) -> Array:
        """``values * 2**exponent``, of which no digit is lost."""

    def eigenvalues(self, matrix: Array) -> NDArray[np.float64]:
        """All eigenvalues of a symmetric matrix given by its lower triangle, largest first, on the host.

        The matrices of a stack may be overwritten.
        """

    def eigenpairs(self, matrix: Array, first: int, last: int) -> tuple[Array, Array]:
        """Eigenpairs of a symmetric matrix given by its lower triangle, by their place in ascending order.

        Places `first` to `last`, both included; values are ascending, vectors the columns of shape (n, count). The
        matrix is overwritten. Raises LinAlgError if there are none to be found.
        """

    def singular_values(self, matrix: Array) -> NDArray[Any]:
        """All singular values of a tall matrix of a few hundred columns, largest first, on the host."""

    def solve_lower(self, factor: Array, right: Array) -> Array:
        """Solve ``factor @ x = right``, shape (n, k), for a lower triangular factor, shape (n, n), both float64."""

    def count_magnitudes(self, counts: Counts, base: Array, delta: Array, threshold: float) -> Counts:
        """Count a panel by the leading 15 magnitude bits of the base as float32, on what was counted before (or None).

        :meth:`magnitudes` tells what was counted.
        """

    def magnitudes(self, counts: Counts) -> list[NDArray[np.int64]]:
        """All entries, those with ``delta != 0`` and those above the threshold, by magnitude, shape (3, 32768).

        Of each matrix; one that is alone makes a list of one.
        """

    def count_scores(
        self, counts: Counts, scores: Array, base: Array, delta: Array, windows: Windows, threshold: float
    ) -> Counts:
        """Count a panel by its scores, C-contiguous arrays of one shape, on what was counted before (or None).

        Of a stack as many matrices as there are windows. :meth:`scores` tells what was counted.
        """

    def scores(self, counts: Counts, windows: Windows) -> list[NDArray[np.float64]]:
        """What :func:`~ckptdiff.linalg.kernels.scores.count_scores` counts, shape (bins + 1, 6), of each matrix.

        Nothing that can be used where there was no window.
        """


def library_of(array: Array) -> Library:
    """The library that an array belongs to, on the device where it lies; CuPy 14 does not tell its namespace."""
    from ckptdiff.linalg.on_any import AnyLibrary
    from ckptdiff.linalg.on_numpy import NUMPY

    if isinstance(array, np.ndarray):
        return NUMPY

    return AnyLibrary(array.__array_namespace__(), array.device)
