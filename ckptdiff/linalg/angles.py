"""Compute principal angles between the leading singular subspaces of the base and of the tuned side.

Cosines come from the product of the bases, sines from what of one basis is outside the other: an arccos alone is noise
below 1e-8 (Björck and Golub 1973).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.principal import SMALLEST_GAP
from ckptdiff.linalg.stages import Panel, Stage
from ckptdiff.linalg.symmetric import whole
from ckptdiff.linalg.threads import count_work, counted
from ckptdiff.linalg.work import eigenvalues_work, gram_work, product_work
from ckptdiff.measure.thresholds import RHO, principal_rank

Float64 = NDArray[np.float64]

_MOST = 512
_NOISE = 1e-6
"""Singular values below this share of the largest have no direction to speak of."""


@dataclass(frozen=True, slots=True)
class Angles:
    """How far apart two pairs of subspaces are."""

    long: Float64
    short: Float64
    """Principal angles between those of the long and of the short side, in radians, smallest first; shape (k,)."""
    rotations: Mapping[int, tuple[Any, Any]]
    """By rank, the mean sine of the angles between the leading parts of so many vectors, of the long and of the short
    side (S1). All of a stack have an axis more in front."""


def angle_rank(short: int) -> int:
    """Between how many singular vectors angles are: min(512, floor(short / 2)) (S3, S4); 0 for a single column."""
    return min(_MOST, short // 2)


def compared_rank(short: int) -> int:
    """How many singular vectors are compared at most: those of angles, or of rotations."""
    return Comparable.most(short).count


@dataclass(frozen=True, slots=True)
class Comparable:
    """What of two sides can be compared."""

    angles: int
    """Between so many of their leading singular vectors there are angles; 0 if there are none."""
    ranks: tuple[int, ...]
    """Of the subspaces that have rotations."""

    @classmethod
    def most(cls, short: int) -> Comparable:
        """All that can be, of sides with so many singular values."""
        return cls(angle_rank(short), tuple(sorted({principal_rank(rho, short) for rho in RHO})))

    @classmethod
    def of(cls, *sides: Float64) -> Comparable:
        """What is defined, by all singular values of each side, largest first."""
        most = cls.most(sides[0].size)
        angles = most.angles if all(_has_directions(values, most.angles) for values in sides) else 0
        return cls(
            angles,
            tuple(k for k in most.ranks if all(_has_directions(values, k) and _has_gap(values, k) for values in sides)),
        )

    @property
    def count(self) -> int:
        """How many leading singular vectors that takes."""
        return max((self.angles, *self.ranks))

    def chosen(self, found: Angles, member: int) -> Angles | None:
        """Of what was computed for all pairs of a stack, what is defined of one."""
        if not self.count:
            return None
        rotations = {k: (found.rotations[k][0][member], found.rotations[k][1][member]) for k in self.ranks}
        return Angles(found.long[member, : self.angles], found.short[member, : self.angles], rotations)


def _has_directions(values: Float64, count: int) -> bool:
    """Whether so many leading singular vectors are no noise."""
    return bool(values[0] > 0 and values[count - 1] > _NOISE * values[0])


def _has_gap(values: Float64, count: int) -> bool:
    """Whether the space that they span is defined."""
    following = values[count] if count < values.size else 0.0
    return bool(values[count - 1] ** 2 - following**2 >= SMALLEST_GAP[8] * values[0] ** 2)


def principal_angles(
    base: Array,
    tuned: Array,
    library: Library = NUMPY,
    *,
    ranks: Sequence[int] = (),
    angles: int | None = None,
    missing: Array | None = None,
) -> Stage[Angles]:
    """Compare two pairs of subspaces in two passes, or those of each pair of a stack.

    They are given by the leading eigenvectors of W0^T W0 and W1^T W1, shape (short, k). Where they are zeros, `missing`
    is what :func:`~ckptdiff.linalg.symmetric.first_of_each` makes of that. Angles are those of so many of them, by
    default of all, and `ranks` are those of rotations.
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
        sides = (cosines, whole(outside, library)), (across, beyond.mT @ beyond)
        rotations = {k: (_mean_sine(*sides[0], k, library), _mean_sine(*sides[1], k, library)) for k in ranks}
        few = count if angles is None else angles
        if not few:
            return Angles(np.empty((*stack, 0)), np.empty((*stack, 0)), rotations)
        sines = _sines(*sides[0], few, library)
        if few < count:
            cosines, across = (library.contiguous(both[..., :few, :few]) for both in (cosines, across))
            beyond = tuned[..., :few] - base[..., :few] @ across
        return Angles(
            _angles(library.singular_values(cosines), sines),
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


def _sines(cosines: Array, outside: Array, k: int, library: Library) -> Float64:
    """Sines of the angles between the first `k` vectors of two bases, largest first.

    Of each of the second basis, what lies outside of the first is known (its Gram matrix is `outside`); to that comes
    what lies along those of the first basis that do not count any more. Both are orthogonal, and nothing cancels.
    """
    beside = cosines[..., k:, :k]
    gram = outside[..., :k, :k] + (beside.mT @ beside if k < cosines.shape[-1] else 0.0)
    return np.sqrt(np.maximum(library.eigenvalues(gram), 0.0))


def _mean_sine(cosines: Array, outside: Array, k: int, library: Library) -> Any:
    return np.minimum(_sines(cosines, outside, k, library), 1.0).mean(axis=-1)


def _angles(cosines: Float64, sines: Float64) -> Float64:
    """Angles from both lists, each largest first."""
    angles: Float64 = np.arctan2(sines[..., ::-1], cosines)
    return angles
