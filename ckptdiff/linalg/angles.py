"""Compute principal angles between the leading singular subspaces of the base and of the tuned side.

Cosines come from the product of the bases, sines from what of one basis is outside the other: an arccos alone is noise
below 1e-8 (Björck and Golub 1973).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import Panel, Stage
from ckptdiff.linalg.symmetric import whole
from ckptdiff.linalg.threads import count_work, counted
from ckptdiff.linalg.work import eigenvalues_work, gram_work, product_work
from ckptdiff.measure.thresholds import RHO, principal_rank

Float64 = NDArray[np.float64]

_MOST = 512


@dataclass(frozen=True, slots=True)
class Angles:
    """How far apart two pairs of subspaces are."""

    long: Float64
    short: Float64
    """Principal angles between those of the long and of the short side, in radians, smallest first; shape (k,)."""
    rotations: Mapping[int, tuple[float, float]]
    """By rank, the mean sine of the angles between the leading parts of so many vectors, of the long and of the short
    side (S1)."""


def angle_rank(short: int) -> int:
    """Between how many singular vectors angles are: min(512, floor(short / 2)) (S3, S4); 0 for a single column."""
    return min(_MOST, short // 2)


def compared_rank(short: int) -> int:
    """How many singular vectors are compared at most: those of angles, or of rotations."""
    return max(angle_rank(short), principal_rank(RHO[-1], short))


def principal_angles(
    base: Array, tuned: Array, library: Library = NUMPY, *, ranks: Sequence[int] = (), angles: int | None = None
) -> Stage[Angles]:
    """Compare two pairs of subspaces in two passes.

    They are given by the leading eigenvectors of W0^T W0 and W1^T W1, shape (short, k). Angles are those of so many of
    them, by default of all, and `ranks` are those of rotations.
    """
    xp, (short, count) = library.xp, base.shape
    product, add_gram, solve_lower = library.product, library.add_gram, library.solve_lower
    ours, theirs, crossed, outside = (library.zeros((count, count), np.float64) for _ in range(4))

    def meet(panel: Panel) -> None:
        left, right = product(panel.base, base), product(panel.side("tuned"), tuned)
        add_gram(ours, left)
        add_gram(theirs, right)
        library.add_product(crossed, left.T, right)

    yield meet
    our_factor, their_factor = (xp.linalg.cholesky(whole(gram, library)) for gram in (ours, theirs))
    cosines = solve_lower(their_factor, solve_lower(our_factor, crossed).T).T

    def leave(panel: Panel) -> None:
        left = solve_lower(our_factor, product(panel.base, base).T)
        right = solve_lower(their_factor, product(panel.side("tuned"), tuned).T)
        add_gram(outside, library.contiguous((right - cosines.T @ left).T))
        count_work(product_work(count, count, right.shape[1], 8))

    yield leave
    with counted(_result_work(short, count), opaque=True):
        across = base.T @ tuned
        beyond = tuned - base @ across
        sides = [
            (library.home(cosines), library.home(whole(outside, library))),
            (library.home(across), library.home(beyond.T @ beyond)),
        ]
        rotations = {k: (_mean_sine(*sides[0], k), _mean_sine(*sides[1], k)) for k in ranks}
        few = count if angles is None else angles
        if not few:
            return Angles(np.empty(0), np.empty(0), rotations)
        if few < count:
            cosines, across = (library.contiguous(both[:few, :few]) for both in (cosines, across))
            beyond = tuned[:, :few] - base[:, :few] @ across
        return Angles(
            _angles(library.singular_values(cosines), _sines(*sides[0], few)),
            _angles(library.singular_values(across), library.singular_values(beyond)),
            rotations,
        )


def angles_work(long: int, short: int) -> float:
    """Foresee what :func:`principal_angles` counts for the vectors that :func:`compared_rank` takes."""
    count = compared_rank(short)
    both = 2 * product_work(long, short, count, 8)
    meeting = both + 2 * gram_work(long, count, 8) + product_work(count, long, count, 8)
    solved = 2 * product_work(count / 2, count, long, 8) + product_work(count, count, long, 8)
    factors = 2 * product_work(count / 2, count, count, 8)
    return meeting + factors + both + solved + gram_work(long, count, 8) + _result_work(short, count)


def _result_work(short: int, count: int) -> float:
    rotated = sum(2 * eigenvalues_work(principal_rank(rho, short), 8) for rho in RHO)
    return 21.0 * short * count**2 + 20.0 * count**3 + rotated


def _sines(cosines: Float64, outside: Float64, k: int) -> Float64:
    """Sines of the angles between the first `k` vectors of two bases, largest first.

    Of each of the second basis, what lies outside of the first is known (its Gram matrix is `outside`); to that comes
    what lies along those of the first basis that do not count any more. Both are orthogonal, and nothing cancels.
    """
    gram = outside[:k, :k] + cosines[k:, :k].T @ cosines[k:, :k]
    return np.sqrt(np.maximum(NUMPY.eigenvalues(gram), 0.0))


def _mean_sine(cosines: Float64, outside: Float64, k: int) -> float:
    return float(np.minimum(_sines(cosines, outside, k), 1.0).mean())


def _angles(cosines: Float64, sines: Float64) -> Float64:
    """Angles from both lists, each largest first."""
    angles: Float64 = np.arctan2(sines[::-1], cosines)
    return angles
