"""Compute principal angles between the leading singular subspaces of the base and of the tuned side.

Cosines come from the product of the bases, sines from what of one basis is outside the other: an arccos alone is noise
below 1e-8 (Björck and Golub 1973).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import Panel, Stage
from ckptdiff.linalg.symmetric import whole
from ckptdiff.linalg.threads import count_work, counted
from ckptdiff.linalg.work import gram_work, product_work

Float64 = NDArray[np.float64]

_MOST = 512


@dataclass(frozen=True, slots=True)
class Angles:
    """Principal angles, in radians, smallest first."""

    long: Float64
    short: Float64
    """Between the subspaces of the long and of the short side; shape (k,), or (pairs, k) for a stack."""


def angle_rank(short: int) -> int:
    """How many singular vectors are compared: min(512, floor(short / 2)) (S3, S4); 0 for a single column."""
    return min(_MOST, short // 2)


def principal_angles(
    base: Array, tuned: Array, library: Library = NUMPY, missing: Array | None = None
) -> Stage[Angles]:
    """Compare two pairs of subspaces in two passes, or those of each pair of a stack.

    They are given by the leading eigenvectors of W0^T W0 and W1^T W1, shape (short, k). Where they are zeros, `missing`
    is what :func:`~ckptdiff.linalg.symmetric.first_of_each` makes of that.
    """
    xp, (*stack, short, count) = library.xp, base.shape
    product, add_gram, solve_lower = library.product, library.add_gram, library.solve_lower
    ours, theirs, crossed, outside = (library.zeros((*stack, count, count), np.float64) for _ in range(4))

    def meet(panel: Panel) -> None:
        left, right = product(panel.base, base), product(panel.side("tuned"), tuned)
        add_gram(ours, left)
        add_gram(theirs, right)
        library.add_product(crossed, left.mT, right)

    yield meet
    grams = [whole(gram, library) for gram in (ours, theirs)]
    our_factor, their_factor = (xp.linalg.cholesky(gram if missing is None else gram + missing) for gram in grams)
    cosines = solve_lower(their_factor, solve_lower(our_factor, crossed).mT).mT

    def leave(panel: Panel) -> None:
        left = solve_lower(our_factor, product(panel.base, base).mT)
        right = solve_lower(their_factor, product(panel.side("tuned"), tuned).mT)
        add_gram(outside, library.contiguous((right - cosines.mT @ left).mT))
        count_work(math.prod(stack) * product_work(count, count, right.shape[-1], 8))

    yield leave
    with counted(math.prod(stack) * _result_work(short, count), opaque=True):
        across = base.mT @ tuned
        beyond = tuned - base @ across
        return Angles(
            _angles(library.singular_values(cosines), np.sqrt(np.maximum(library.eigenvalues(outside), 0.0))),
            _angles(library.singular_values(across), library.singular_values(beyond)),
        )


def angles_work(long: int, short: int) -> float:
    """Foresee what :func:`principal_angles` counts for the vectors that :func:`angle_rank` takes."""
    count = angle_rank(short)
    both = 2 * product_work(long, short, count, 8)
    meeting = both + 2 * gram_work(long, count, 8) + product_work(count, long, count, 8)
    solved = 2 * product_work(count / 2, count, long, 8) + product_work(count, count, long, 8)
    factors = 2 * product_work(count / 2, count, count, 8)
    return meeting + factors + both + solved + gram_work(long, count, 8) + _result_work(short, count)


def _result_work(short: int, count: int) -> float:
    return 20.0 * short * count**2 + 20.0 * count**3


def _angles(cosines: Float64, sines: Float64) -> Float64:
    """Angles from both lists, each largest first."""
    angles: Float64 = np.arctan2(sines[..., ::-1], cosines)
    return angles
