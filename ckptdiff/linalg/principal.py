"""Measure how much of an update lies in the principal subspaces of its base, and on its principal entries.

The principal subspaces are spanned by the top singular vectors of W0. They come from the Gram matrix of the short side
and a partial eigendecomposition: randomized rank-k subspaces would leave the energies off by up to several percent.
With V the leading eigenvectors, A = W0 V spans the long side's subspace; it is made orthonormal by the Cholesky factor
of A^T A, which keeps the subspaces of fewer vectors nested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.score_cut import Covered, ScoreCut, likely_zooms
from ckptdiff.linalg.stages import Panel, PanelSource, Stage, meanwhile
from ckptdiff.linalg.survey import Survey
from ckptdiff.linalg.symmetric import eigh_top, gram_of, whole
from ckptdiff.linalg.threads import count_work, counted, cuts, in_parts
from ckptdiff.linalg.work import eigenpairs_work, gram_work, product_work
from ckptdiff.measure.thresholds import exactly, principal_rank

SMALLEST_GAP = {4: 1e-6, 8: 1e-9}
"""By item size: a subspace is defined if its last eigenvalue stands out from the next by this share of the largest."""
_NOISE = 64
"""Eigenvalues of a Gram matrix are noise below this many units of rounding of the largest."""
_SAMPLED_ROWS, _SAMPLED = 32, 1 << 13
"""Rows, and entries, that tell about where a cut is."""
_SCORE_WORK, _NORM_WORK = 250.0, 35.0
"""The work of counting an entry by its score, and of adding its square to a norm."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The figures of one rho."""

    rho: float
    rank: int
    """Singular vectors taken: max(1, floor(rho short))."""
    gap: float
    """(lambda_k - lambda_{k+1}) / lambda_1 of W0^T W0."""
    reason: str = ""
    """Why there are no figures; empty if there are."""
    energy: float = math.nan
    energy_long: float = math.nan
    energy_short: float = math.nan
    """Share of norm(d)^2 in both subspaces, in that of the long side, in that of the short side (S1)."""
    coverage: float = math.nan
    coverage_above: float = math.nan
    """Share of the changed entries, of those with |d| > 1e-5, among the ceil(rho N) largest |U_k S_k V_k^T| (S1)."""
    not_low: float = math.nan
    not_low_above: float = math.nan
    """Share of the same two that is there and not among the ceil(rho N) smallest |W0| (S3, S1)."""
    null: float = math.nan
    """What `coverage` would be for a rounded Gaussian update of the same support."""


def principal(
    source: PanelSource,
    known: Survey,
    rhos: Sequence[float],
    chances: NDArray[np.float64] | None,
    *,
    error: float,
    eigenpairs: tuple[Array, Array] | None = None,
) -> Stage[tuple[NDArray[np.float64], list[Principal]]]:
    """Measure an update against the principal subspaces of its base.

    Parameters
    ----------
    known : Survey
        Of this pair, with counts; the update is not zero.
    rhos : sequence of float
        Ascending.
    chances : float64 array, shape (32768,), optional
        By magnitude of W0, the chance to be changed under the rounding null.
    error : float
        Standard error of a coverage that needs no further pass.
    eigenpairs : (values, vectors), optional
        Leading eigenpairs of W0^T W0, if they are known already.

    Returns
    -------
    values : float64 array
        Leading eigenvalues of W0^T W0, one more than the largest subspace has vectors (if there are so many).
    figures : list of Principal
        One for each rho.
    """
    short, dtype, library = source.short, source.dtype, source.library
    wanted = min(principal_rank(rhos[-1], short) + 1, short)
    if eigenpairs is None:
        gram = yield from gram_of("base", short, dtype, library)
        eigenpairs = yield from meanwhile(partial(eigh_top, gram, wanted, library))
        del gram
    spectrum = library.home(eigenpairs[0][:wanted]).astype(np.float64)
    figures = [_subspace(rho, short, spectrum, dtype) for rho in rhos]
    defined = [figure for figure in figures if not figure.reason]
    if not defined:
        return spectrum, figures
    vectors = library.contiguous(eigenpairs[1][:, : defined[-1].rank])
    energies = _Energies(short, vectors, dtype, library)
    cuts = _cuts(source, known, defined, vectors, chances, error)
    scores = _Scores(vectors, [figure.rank for figure in defined], cuts, source)

    def visit(panel: Panel) -> None:
        projected = library.product(panel.base, vectors)
        energies.add(panel, projected)
        scores.add(panel, projected)

    yield visit
    while not scores.settle():
        yield scores.add
    found = energies.shares([figure.rank for figure in defined], known.delta_norm**2)
    expected = math.nan if chances is None else float(chances @ known.weights)
    done = {
        figure.rho: _complete(figure, shares, cut.covered, known, expected)
        for figure, shares, cut in zip(defined, found, cuts, strict=True)
    }
    return spectrum, [done.get(figure.rho, figure) for figure in figures]


def principal_work(
    long: int, short: int, itemsize: int, rhos: Sequence[float], *, error: float, decomposed: bool
) -> tuple[float, int]:
    """Foresee what :func:`principal` counts, as far as sizes tell, and how many passes it makes.

    `decomposed` says that eigenpairs of W0^T W0 are given.
    """
    rank = principal_rank(rhos[-1], short)
    projected = 2 * product_work(long, short, rank, itemsize) + _NORM_WORK * long * rank
    met = product_work(rank, long, short, itemsize) + gram_work(long, rank, itemsize)
    scores = _scores_work(long, short, rank, itemsize, len(rhos))
    found, passes = projected + met + scores + _shares_work(rank, short), 1
    if not decomposed:
        found += gram_work(long, short, itemsize) + eigenpairs_work(short, min(rank + 1, short), itemsize)
        passes += 1
    if likely_zooms(long * short, error):
        found += scores + product_work(long, short, rank, itemsize)
        passes += 1
    return found, passes


def _scores_work(rows: int, short: int, rank: int, itemsize: int, cuts: int) -> float:
    return product_work(rows, rank, short, itemsize) + _SCORE_WORK * cuts * rows * short


def _shares_work(rank: int, short: int) -> float:
    return 4.0 * rank**2 * short + 2.0 * rank**3


def _subspace(rho: float, short: int, values: NDArray[np.float64], dtype: np.dtype[Any]) -> Principal:
    """Whether the subspace of a rho is defined."""
    rank = principal_rank(rho, short)
    if not values[0] > 0:
        return Principal(rho, rank, math.nan, "the base is zero")
    following = max(float(values[rank]), 0.0) if rank < values.size else 0.0
    gap = (float(values[rank - 1]) - following) / float(values[0])
    if values[rank - 1] < _NOISE * np.finfo(dtype).eps * values[0]:
        return Principal(rho, rank, gap, "the base's singular values are noise there")
    if gap < SMALLEST_GAP[dtype.itemsize]:
        return Principal(rho, rank, gap, "the base's spectrum has no gap there")
    return Principal(rho, rank, gap)


def _cuts(
    source: PanelSource,
    known: Survey,
    figures: Sequence[Principal],
    vectors: Array,
    chances: NDArray[np.float64] | None,
    error: float,
) -> list[ScoreCut]:
    """A cut for each rho, which starts from that of a sample of rows."""
    library = source.library
    rows = source.sample(max(_SAMPLED_ROWS, _SAMPLED // source.short))
    projected = rows @ vectors
    found = []
    weights = np.zeros(len(known.weights)) if chances is None else chances
    for figure, low in zip(figures, known.low_cuts([figure.rho for figure in figures]), strict=True):
        scores = abs(library.home(projected[:, : figure.rank] @ vectors[:, : figure.rank].T)).ravel()
        place = int((1 - figure.rho) * (scores.size - 1))
        guess = float(np.partition(scores, place)[place])
        rank = max(1, math.ceil(exactly(figure.rho) * known.numel))
        found.append(ScoreCut(rank, guess, weights, low, error * known.support, library))
    return found


class _Energies:
    """Projections of the update, panel by panel."""

    def __init__(self, short: int, vectors: Array, dtype: np.dtype[Any], library: Library) -> None:
        rank = vectors.shape[1]
        self._library, self._vectors = library, vectors
        self._spanned = library.zeros((rank, rank), dtype)
        self._met = library.zeros((rank, short), dtype)
        self._kept = library.zeros((rank,), np.float64)

    def add(self, panel: Panel, projected: Array) -> None:
        """Take a panel and ``W0 V`` of its rows."""
        library = self._library
        library.add_gram(self._spanned, projected)
        library.add_product(self._met, projected.T, panel.delta)
        moved = library.product(panel.delta, self._vectors)
        self._kept += library.squares(moved, axis=0)
        count_work(_NORM_WORK * moved.shape[0] * moved.shape[1])

    def shares(self, ranks: Sequence[int], total: float) -> Iterator[tuple[float, float, float]]:
        """Yield the share of the energy in both subspaces, the long side's, and the short side's, for each rank."""
        library, xp = self._library, self._library.xp
        with counted(_shares_work(*self._met.shape), opaque=True):
            factor = xp.linalg.cholesky(whole(self._spanned, library))
            long_side = library.solve_lower(factor, library.cast(self._met, np.float64))
            both = long_side @ library.cast(self._vectors, np.float64)
        for k in ranks:
            parts = xp.sum(both[:k, :k] ** 2), xp.sum(long_side[:k, :] ** 2), xp.sum(self._kept[:k])
            joint, left, right = (float(library.home(part)) for part in parts)
            yield joint / total, left / total, right / total


class _Scores:
    """Scores |W0 V_k V_k^T| of every rho, each from the one before."""

    def __init__(self, vectors: Array, ranks: Sequence[int], cuts: Sequence[ScoreCut], source: PanelSource) -> None:
        self._vectors, self._ranks, self._cuts = vectors, ranks, cuts
        self._library, self._itemsize = source.library, source.dtype.itemsize
        self._open = list(cuts)

    def add(self, panel: Panel, projected: Array | None = None) -> None:
        """Count the scores of a panel for every cut that is not settled."""
        library = self._library
        if projected is None:
            projected = library.product(panel.base, self._vectors)
        at = cuts(projected.shape[0], most=library.lanes)
        lines = self._vectors.T

        def count(lane: int) -> None:
            rows = slice(at[lane], at[lane + 1])
            part = Panel(panel.base[rows, :], panel.delta[rows, :])
            scores, done = None, 0
            for rank, cut in zip(self._ranks, self._cuts, strict=True):
                if scores is None:
                    scores = library.product(projected[rows, :rank], lines[:rank, :])
                else:
                    library.add_product(scores, projected[rows, done:rank], lines[done:rank, :])
                done = rank
                if cut in self._open:
                    cut.add(scores, part, lane)

        rows, short = panel.base.shape
        with counted(_scores_work(rows, short, self._ranks[-1], self._itemsize, len(self._open))):
            in_parts(count, len(at) - 1)

    def settle(self) -> bool:
        """Finish a pass: True if every cut is found."""
        self._open = [cut for cut in self._open if not cut.settle()]
        return not self._open


def _complete(
    figure: Principal,
    shares: tuple[float, float, float],
    covered: Covered | None,
    known: Survey,
    expected: float,
) -> Principal:
    """The figures of a rho; `expected` is how many entries the null changes."""
    assert covered is not None

    def of(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    return Principal(
        figure.rho,
        figure.rank,
        figure.gap,
        "",
        *shares,
        coverage=of(covered.changed, known.support),
        coverage_above=of(covered.above, known.above),
        not_low=of(covered.not_low, known.support),
        not_low_above=of(covered.above_not_low, known.above),
        null=of(covered.chance, expected),
    )
