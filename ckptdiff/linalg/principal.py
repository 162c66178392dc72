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
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.score_cut import ScoreCut, ScoreCuts, likely_zooms
from ckptdiff.linalg.stages import Panel, PanelSource, Stage, meanwhile
from ckptdiff.linalg.survey import Survey
from ckptdiff.linalg.symmetric import eigh_top, first_of_each, gram_of, whole
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


Measured: TypeAlias = tuple[NDArray[np.float64], list[Principal]]
"""Leading eigenvalues of W0^T W0, and the figures of each rho."""


def principal(
    source: PanelSource,
    known: Survey,
    rhos: Sequence[float],
    chances: NDArray[np.float64] | None,
    *,
    error: float,
    eigenpairs: tuple[Array, Array] | None = None,
) -> Stage[Measured]:
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
    (found,) = yield from principal_of_each(source, [known], rhos, [chances], error=error, eigenpairs=eigenpairs)
    assert found is not None
    return found


def principal_of_each(
    source: PanelSource,
    known: Sequence[Survey | None],
    rhos: Sequence[float],
    chances: Sequence[NDArray[np.float64] | None],
    *,
    error: float,
    eigenpairs: tuple[Array, Array] | None = None,
) -> Stage[list[Measured | None]]:
    """The same of the first pairs of a stack; one without a survey is left out."""
    short, dtype, library = source.short, source.dtype, source.library
    wanted = min(principal_rank(rhos[-1], short) + 1, short)
    if eigenpairs is None:
        gram = yield from gram_of("base", short, dtype, library, source.stack)
        eigenpairs = yield from meanwhile(partial(eigh_top, gram, wanted, library))
        del gram
    spectra = library.home(eigenpairs[0][..., :wanted]).astype(np.float64).reshape(-1, wanted)
    figures = [[_subspace(rho, short, spectrum, dtype) for rho in rhos] for spectrum in spectra[: len(known)]]
    # Of a stack all, as if each were defined in each pair: then no digit of one depends on the others.
    taken = [place for place, figure in enumerate(figures[0]) if source.stack or not figure.reason]
    if not taken:
        return [(spectra[0], figures[0])]
    ranks = [figures[0][place].rank for place in taken]
    vectors, missing = library.contiguous(eigenpairs[1][..., : ranks[-1]]), None
    if source.stack:
        last = [max((one.rank for one in row if not one.reason), default=0) for row in figures]
        vectors, missing = first_of_each(vectors, np.array(last), dtype, library)
    energies = _Energies(vectors, missing, dtype, library)
    cuts = _cuts(source, known, [[row[place] for place in taken] for row in figures], vectors, chances, error)
    scores = _Scores(vectors, ranks, cuts, source)

    def visit(panel: Panel) -> None:
        projected = library.product(panel.base, vectors)
        energies.add(panel, projected)
        scores.add(panel, projected)

    yield visit
    while not scores.settle():
        yield scores.add
    shares = list(energies.shares(ranks))
    found: list[Measured | None] = []
    for member, (survey, row, weighed) in enumerate(zip(known, figures, chances, strict=True)):
        if survey is None:
            found.append(None)
            continue
        expected = math.nan if weighed is None else float(weighed @ survey.weights)
        for place, energy, cut in zip(taken, shares, cuts, strict=True):
            if not row[place].reason:
                row[place] = _complete(row[place], energy[:, member], cut.cuts[member], survey, expected)
        found.append((spectra[member], row))
    return found


def principal_work(
    long: int, short: int, itemsize: int, rhos: Sequence[float], *, error: float, decomposed: bool
) -> tuple[float, int]:
    """Foresee what :func:`principal` counts, as far as sizes tell, and how many passes it makes.

    `decomposed` says that eigenpairs of W0^T W0 are given.
    """
    rank = principal_rank(rhos[-1], short)
    projected = 2 * product_work(long, short, rank, itemsize) + _NORM_WORK * long * rank
    met = product_work(short, long, rank, itemsize) + gram_work(long, rank, itemsize)
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
    known: Sequence[Survey | None],
    figures: Sequence[Sequence[Principal]],
    vectors: Array,
    chances: Sequence[NDArray[np.float64] | None],
    error: float,
) -> list[ScoreCuts]:
    """The cuts of each rho, each of which starts from that of a sample of rows; `figures` has a row for each pair."""
    library = source.library
    projected = source.sample(max(_SAMPLED_ROWS, _SAMPLED // source.short)) @ vectors
    rhos = [figure.rho for figure in figures[0]]
    lows = [[] if survey is None else list(survey.low_cuts(rhos)) for survey in known]
    found = []
    for place, rank in enumerate([figure.rank for figure in figures[0]]):
        scores = abs(library.home(projected[..., :rank] @ vectors[..., :rank].mT))
        own = scores.reshape(-1, scores.shape[-2] * scores.shape[-1])
        cuts: list[ScoreCut | None] = []
        for member, (survey, low, weighed) in enumerate(zip(known, lows, chances, strict=True)):
            figure = figures[member][place]
            if survey is None or figure.reason:
                cuts.append(None)
                continue
            at = int((1 - figure.rho) * (own[member].size - 1))
            guess = float(np.partition(own[member], at)[at])
            count = max(1, math.ceil(exactly(figure.rho) * survey.numel))
            weights = np.zeros(len(survey.weights)) if weighed is None else weighed
            cuts.append(ScoreCut(count, guess, weights, low[place], error * survey.support))
        found.append(ScoreCuts(cuts, library))
    return found


class _Energies:
    """Projections of the update, panel by panel."""

    def __init__(self, vectors: Array, missing: Array | None, dtype: np.dtype[Any], library: Library) -> None:
        *stack, short, rank = vectors.shape
        self._library, self._vectors, self._missing, self._dtype = library, vectors, missing, dtype
        self._spanned = library.zeros((*stack, rank, rank), dtype)
        self._met = library.zeros((*stack, short, rank), dtype)
        self._kept = library.zeros((*stack, rank), np.float64)

    def add(self, panel: Panel, projected: Array) -> None:
        """Take a panel and ``W0 V`` of its rows."""
        library = self._library
        library.add_gram(self._spanned, projected)
        library.add_product(self._met, panel.delta.mT, projected)
        moved = library.product(panel.delta, self._vectors)
        self._kept += library.squares(moved, by_column=True)
        count_work(_NORM_WORK * math.prod(moved.shape))

    def shares(self, ranks: Sequence[int]) -> Iterator[NDArray[np.float64]]:
        """Yield the energy in both subspaces, the long side's, the short side's, shape (3, pairs), for each rank."""
        library, xp = self._library, self._library.xp
        *stack, short, rank = self._met.shape
        with counted(math.prod(stack) * _shares_work(rank, short), opaque=True):
            spanned = whole(self._spanned, library)
            factor = xp.linalg.cholesky(spanned if self._missing is None else spanned + self._missing)
            met = library.contiguous(library.cast(self._met, np.float64).mT)
            long_side = library.solve_lower(factor, met)
            # What it is made of is no more exact than the panels.
            both = library.cast(library.cast(long_side, self._dtype) @ self._vectors, np.float64)
        for k in ranks:
            joint, left = (xp.sum(part**2, axis=(-2, -1)) for part in (both[..., :k, :k], long_side[..., :k, :]))
            parts = joint, left, xp.sum(self._kept[..., :k], axis=-1)
            yield np.array([library.home(part) for part in parts]).reshape(3, -1)


class _Scores:
    """Scores |W0 V_k V_k^T| of every rho, each from the one before."""

    def __init__(self, vectors: Array, ranks: Sequence[int], cuts: Sequence[ScoreCuts], source: PanelSource) -> None:
        self._vectors, self._ranks, self._cuts = vectors, ranks, cuts
        self._library, self._itemsize = source.library, source.dtype.itemsize

    def add(self, panel: Panel, projected: Array | None = None) -> None:
        """Count the scores of a panel for every rho with a cut that is not settled."""
        library = self._library
        if projected is None:
            projected = library.product(panel.base, self._vectors)
        at = cuts(projected.shape[-2], most=library.lanes)
        lines = self._vectors.mT

        def count(lane: int) -> None:
            rows = slice(at[lane], at[lane + 1])
            part = Panel(panel.base[..., rows, :], panel.delta[..., rows, :])
            scores, done = None, 0
            for rank, cut in zip(self._ranks, self._cuts, strict=True):
                if scores is None:
                    scores = library.product(projected[..., rows, :rank], lines[..., :rank, :])
                else:
                    library.add_product(scores, projected[..., rows, done:rank], lines[..., done:rank, :])
                done = rank
                if cut.open:
                    cut.add(scores, part, lane)

        *rows, short = panel.base.shape
        counted_at = sum(cut.open for cut in self._cuts)
        with counted(_scores_work(math.prod(rows), short, self._ranks[-1], self._itemsize, counted_at)):
            in_parts(count, len(at) - 1)

    def settle(self) -> bool:
        """Finish a pass: True if every cut is found."""
        for cut in self._cuts:
            if cut.open:
                cut.settle()
        return not any(cut.open for cut in self._cuts)


def _complete(
    figure: Principal,
    energies: NDArray[np.float64],
    cut: ScoreCut | None,
    known: Survey,
    expected: float,
) -> Principal:
    """The figures of a rho, of its three energies; `expected` is how many entries the null changes."""
    assert cut is not None and cut.covered is not None
    covered, (joint, long_side, short_side) = cut.covered, (energies / known.delta_norm**2).tolist()

    def of(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    return Principal(
        figure.rho,
        figure.rank,
        figure.gap,
        "",
        joint,
        long_side,
        short_side,
        coverage=of(covered.changed, known.support),
        coverage_above=of(covered.above, known.above),
        not_low=of(covered.not_low, known.support),
        not_low_above=of(covered.above_not_low, known.above),
        null=of(covered.chance, expected),
    )
