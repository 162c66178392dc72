"""Find every singular value of a matrix, from its float64 Gram matrix and one more pass for the small ones.

Eigenvalues of a Gram matrix carry an error of c eps lambda_1, so singular values near zero are only good to
3e-8 s_1. Where an eigenvalue is below 1e-6 lambda_1, its eigenvector is taken, and the singular values of A times
all such vectors, found the same way from a much smaller Gram matrix, replace the square roots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import Panel, Side, Stage, meanwhile
from ckptdiff.linalg.symmetric import eigh_bottom, eigh_top, gram_of
from ckptdiff.linalg.work import eigenpairs_work, eigenvalues_work, gram_work

Float64 = NDArray[np.float64]

ACCURACY = 1e-11
"""Error of a singular value, as a share of the largest."""
_SMALL = 1e-6
"""Eigenvalues below this share of the largest are found again."""


@dataclass(frozen=True, slots=True)
class SideSpectrum:
    """The spectrum of one matrix."""

    values: Float64
    """Singular values, largest first; shape (short,)."""
    eigenpairs: tuple[Array, Array] | None
    """Leading eigenpairs of the Gram matrix, as many as were asked for."""


def side_spectrum(side: Side, short: int, vectors: int = 0, library: Library = NUMPY) -> Stage[SideSpectrum]:
    """Find all singular values of one side, and leading eigenvectors of its Gram matrix; two passes at most.

    Its panels are float64.
    """
    gram = yield from gram_of(side, short, np.float64, library)
    squares, bottom, pairs = yield from meanwhile(partial(_decomposed, gram, vectors, library))
    del gram
    values = np.sqrt(np.maximum(squares, 0.0))
    if bottom is not None:
        few = bottom.shape[1]
        rest = library.zeros((few, few), np.float64)

        def project(panel: Panel) -> None:
            library.add_gram(rest, library.product(panel.side(side), bottom))

        yield project
        values[short - few :] = np.sqrt(np.maximum(library.eigenvalues(rest), 0.0))
        values[::-1].sort()
    return SideSpectrum(values, pairs)


def values_of_each(
    side: Side, short: int, vectors: int, library: Library, stack: tuple[int, ...], members: int
) -> Stage[tuple[Float64, tuple[Array, Array]]]:
    """The same of the first `members` matrices of a stack: their values in rows, and leading eigenpairs of all.

    Small values are found again for all matrices at once that have about as many, up to the next power of two: there
    are few such powers, and what a matrix has then does not depend on the others.
    """
    gram = yield from gram_of(side, short, np.float64, library, stack)
    found, pairs = eigh_top(gram, short, library)
    squares = library.home(found)[:members]
    values = np.sqrt(np.maximum(squares, 0.0))
    again: dict[int, dict[int, int]] = {}
    for member, few in enumerate(map(_few, squares)):
        if few:
            again.setdefault(min(1 << (few - 1).bit_length(), short), {})[member] = few
    bottoms = {count: library.contiguous(pairs[..., short - count :]) for count in again}
    for count, numbers in again.items():
        bottoms[count] = bottoms[count] * library.put(_last_of_each(numbers, (*stack, 1, count)))
    rests = {count: library.zeros((*stack, count, count), np.float64) for count in again}

    def project(panel: Panel) -> None:
        matrices = panel.side(side)
        for count, rest in rests.items():
            library.add_gram(rest, library.product(matrices, bottoms[count]))

    if again:
        yield project
    for count, numbers in again.items():
        small = np.sqrt(np.maximum(library.eigenvalues(rests[count])[:members], 0.0))
        for member, few in numbers.items():
            values[member, short - few :] = small[member, :few]
    values[:, ::-1].sort()
    return values, (found[:, :vectors], library.contiguous(pairs[..., :vectors]))


def _last_of_each(numbers: Mapping[int, int], shape: tuple[int, ...]) -> Float64:
    """Ones at so many of the last vectors of some matrices, by their place in a stack, else zeros."""
    kept = np.zeros(shape)
    for member, few in numbers.items():
        kept[member, 0, shape[-1] - few :] = 1.0
    return kept


def side_work(long: int, short: int, vectors: int = 0) -> float:
    """Foresee what :func:`side_spectrum` counts, unless it has small singular values to find again."""
    found = gram_work(long, short, 8) + eigenvalues_work(short, 8)
    return found + (eigenpairs_work(short, min(vectors, short), 8) if vectors else 0.0)


def _decomposed(
    gram: Array, vectors: int, library: Library
) -> tuple[Float64, Array | None, tuple[Array, Array] | None]:
    """All eigenvalues, the eigenvectors of those to be found again, and as many leading eigenpairs as asked for."""
    short = gram.shape[0]
    top = min(vectors, short)
    if top and library.at_once:
        values, found = eigh_top(gram, short, library)
        squares = library.home(values)
        few = _few(squares)
        bottom = library.contiguous(found[:, short - few :]) if few else None
        return squares, bottom, (values[:top], library.contiguous(found[:, :top]))
    squares = library.eigenvalues(gram)
    few = _few(squares)
    bottom = eigh_bottom(gram + 0.0 if top else gram, few, library) if few else None
    return squares, bottom, eigh_top(gram, top, library) if top else None


def _few(squares: Float64) -> int:
    """How many eigenvalues are to be found again."""
    return int((squares < _SMALL * squares[0]).sum()) if squares[0] > 0 else 0


def numerical_rank(values: Float64, tau: float) -> tuple[int, int]:
    """How many singular values exceed ``tau`` times the largest: the fewest and the most that rounding allows.

    The values are float64, largest first, and not all zero.
    """
    error = ACCURACY * values[0]
    return int((values > tau * values[0] + error).sum()), int((values > tau * values[0] - error).sum())


def hard_threshold(values: Float64, long: int) -> float:
    """Where the singular values of noise end: the optimal hard threshold of Donoho and Gavish (2014).

    With b = short / long it is 0.56 b^3 - 0.95 b^2 + 1.82 b + 1.43 times the median of the values, which are all of a
    matrix, largest first; NaN if the median is not known from zero.
    """
    middle, b = float(np.median(values)), values.size / long
    known = middle > ACCURACY * values[0]
    return (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * middle if known else float("nan")


def effective_rank(values: Float64) -> float:
    """``exp(-sum p ln p)`` with ``p = s / sum s`` (Roy and Vetterli 2007)."""
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def nss(base: Float64, tuned: Float64) -> float:
    """``norm(s(W1) - s(W0)) / norm(s(W0))`` (S3); NaN for a base of zero."""
    size = float(np.linalg.norm(base))
    return float(np.linalg.norm(tuned - base)) / size if size else float("nan")
