"""Find leading singular values of an update by a seeded block Krylov method, and bound what it may have missed.

Updates have flat spectra: plain randomized projection is tens of percent off, and subspace iteration still misses
the 64th singular value by a tenth (Halko, Martinsson, Tropp 2011 describe both). A block Krylov space keeps every
block of the power iteration (Musco & Musco 2015), so p passes give the accuracy of a polynomial of degree p.

With G = d^T d, Q an orthonormal basis of the space, H = Q^T G Q and its Ritz values theta:

- below: every theta_i is at most the i-th eigenvalue of G;
- above: with R = G Q - Q H and mu at least the largest eigenvalue of G on the complement of Q, the i-th eigenvalue is
  at most that of H + R^T R / (theta_k - mu) for i <= k (a Schur complement, at the eigenvalue itself).

mu comes from a power method with fresh Gaussian probes. It is too small with a chance of at most one in a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import Panel, Stage, meanwhile
from ckptdiff.linalg.symmetric import eigh_top, gram_of, mirrored
from ckptdiff.linalg.threads import counted
from ckptdiff.linalg.work import eigenpairs_work, eigenvalues_work, gram_work, product_work

Float64 = NDArray[np.float64]

_PROBES = 16
_PROBE_PASSES = 3
_CHI_SQUARE = 3.942
"""What a chi-square variable of 16 degrees of freedom exceeds with probability 0.999."""
_FEWEST_STEPS = 3
_NEAR = 1e-8
_COHERENT = 256
"""Units of rounding by which a sum of equal terms may be off: between two powers of two all round the same way."""


@dataclass(frozen=True, slots=True)
class KrylovOptions:
    """How much work to do."""

    block: int = 32
    """Vectors of a block."""
    steps: int = 10
    """Blocks, each of which takes a pass."""
    tolerance: float = 0.01
    """Stop early when every wanted Ritz value has a residual of at most this share of itself."""
    seed: int = 0
    """Of the starting block and the probes."""
    gram: int = 4096
    """Up to so many columns ``d^T d`` is made, once, in place of products with d, narrow ones that each read it."""
    sparse: bool = False
    """Whether the entries that are not zero are kept instead, where the library does better with them."""


@dataclass(frozen=True, slots=True)
class LeadingValues:
    """The largest eigenvalues of ``d^T d``, between two bounds."""

    lower: Float64
    """Ritz values, largest first: the estimate, and a lower bound of each; shape (k,)."""
    upper: Mapping[int, float]
    """Upper bound of the sum of the first k eigenvalues, by k."""
    vectors: Array
    """Ritz vectors, approximate singular ones of the short side; shape (short, at most k), (short, 0) if not wanted."""
    steps: int
    """Blocks that were used; 0 without a Krylov space."""


_Search: TypeAlias = Generator[Array, Array, LeadingValues]
"""Yields blocks, and is sent what ``d^T d`` makes of them."""


def krylov_values(
    short: int, ranks: Sequence[int], dtype: Any, options: KrylovOptions, library: Library = NUMPY
) -> Stage[LeadingValues]:
    """Find the leading eigenvalues of ``d^T d``: in one pass, or if that is large, one a step and three for the bound.

    Sums are bounded at the `ranks`, ascending, of which the last is how many eigenvalues are wanted.
    """
    search = _search(short, _within(ranks, short), dtype, options, library)
    block = next(search)
    few = library.nonzeros() if options.sparse else None
    if few is not None:
        yield lambda panel: few.add(panel.delta)
        return (yield from meanwhile(lambda: _found(search, block, few.squared_product)))
    if short <= options.gram:
        gram = yield from gram_of("delta", short, dtype, library)
        return (yield from meanwhile(lambda: _found(search, block, partial(library.product, mirrored(gram, library)))))
    image = block

    def apply(panel: Panel) -> None:
        library.add_product(image, panel.delta.T, library.product(panel.delta, block))

    try:
        while True:
            image = library.zeros(block.shape, dtype)
            yield apply
            block = search.send(image)
    except StopIteration as end:
        return cast(LeadingValues, end.value)


def _found(search: _Search, block: Array, square: Callable[[Array], Array]) -> LeadingValues:
    try:
        while True:
            block = search.send(square(block))
    except StopIteration as end:
        return cast(LeadingValues, end.value)


def _search(short: int, ranks: Sequence[int], dtype: Any, options: KrylovOptions, library: Library) -> _Search:
    wanted = ranks[-1]
    rng = np.random.default_rng(options.seed)
    basis = _Basis(short, min(options.block * options.steps, short), dtype, library)
    start = library.put(rng.standard_normal((short, min(options.block, short))).astype(dtype))
    block = _orthonormal(start, 0.0, dtype, library)
    steps = 0
    while True:
        image = yield block
        with counted(_step_work(short, basis.size + block.shape[1], block.shape[1])):
            basis.add(block, image)
            steps += 1
            if steps == options.steps or basis.full:
                break
            rest = basis.deflate(image, 2)
            # Every other time, and not before the last one: to find out costs as much as a step.
            may_end = _FEWEST_STEPS <= steps < options.steps - 1 and steps % 2
            if may_end and basis.residual(rest, wanted) <= options.tolerance:
                break
            block = basis.next_block(rest)
        if not block.shape[1]:
            break  # the space is invariant: it holds all of the update's row space that the seed can see
    beyond = 0.0
    if not basis.full:
        probes = basis.deflate(library.put(rng.standard_normal((short, _PROBES)).astype(dtype)))
        scale = 0
        for _ in range(_PROBE_PASSES):
            image = yield probes
            with counted(_step_work(short, basis.size, _PROBES)):
                probes = basis.deflate(image)
            # Third powers of eigenvalues may leave the range of float32; scaled by powers of two they lose no digit.
            exponent = math.frexp(math.sqrt(_sum_of_squares(probes, library)))[1]
            probes = library.scaled(probes, -exponent)
            scale += exponent
        square = _sum_of_squares(probes, library)
        beyond = (square / _CHI_SQUARE) ** (1 / (2 * _PROBE_PASSES)) * 2.0 ** (scale / _PROBE_PASSES)
    with counted(_result_work(short, basis.size), opaque=True):
        return basis.result(ranks, beyond, steps)


def krylov_passes(short: int, options: KrylovOptions) -> int:
    """How many passes :func:`krylov_values` makes, unless the space is complete early."""
    return 1 if short <= options.gram else options.steps + _PROBE_PASSES


def krylov_work(long: int, short: int, itemsize: int, options: KrylovOptions) -> float:
    """Foresee what :func:`krylov_values` counts, unless the space is complete early."""
    found = gram_work(long, short, itemsize) if short <= options.gram else 0.0
    for block, passes in ((options.block, options.steps), (_PROBES, _PROBE_PASSES)):
        tall = product_work(short if short <= options.gram else long, short, block, itemsize)
        found += passes * (1 if short <= options.gram else 2) * tall
    size = options.block * options.steps
    found += sum(_step_work(short, step * options.block, options.block) for step in range(1, options.steps + 1))
    return found + _PROBE_PASSES * _step_work(short, size, _PROBES) + _result_work(short, size)


def _step_work(short: int, size: int, block: int) -> float:
    """Between two passes: sums in float64, projections, and the eigenproblem of the space."""
    return 65.0 * short * size * block + 18.0 * size**3


def _result_work(short: int, size: int) -> float:
    return 7.0 * short * size**2 + 76.0 * size**3


def direct_values(
    short: int, ranks: Sequence[int], *, with_vectors: bool = True, library: Library = NUMPY
) -> Stage[LeadingValues]:
    """Find the same from the float64 Gram matrix in one pass, which is quicker for a small short side.

    Parameters as for :func:`krylov_values`; without vectors it takes half the time.
    """
    ranks = _within(ranks, short)
    gram = yield from gram_of("delta", short, np.float64, library)
    if with_vectors:
        found, vectors = eigh_top(gram, ranks[-1], library)
        values = library.home(found).astype(np.float64)
    else:
        values, vectors = library.eigenvalues(gram)[: ranks[-1]], library.zeros((short, 0), np.float64)
    return _leading(values, ranks, short, vectors)


def direct_values_of_each(
    short: int, ranks: Sequence[int], library: Library, stack: tuple[int, ...], members: int
) -> Stage[list[LeadingValues]]:
    """The same without vectors, of the first `members` updates of a stack."""
    ranks = _within(ranks, short)
    gram = yield from gram_of("delta", short, np.float64, library, stack)
    found = library.eigenvalues(gram)[:members, : ranks[-1]]
    return [_leading(values, ranks, short, library.zeros((short, 0), np.float64)) for values in found]


def _leading(values: Float64, ranks: Sequence[int], short: int, vectors: Array) -> LeadingValues:
    """Leading values with no more error than their rounding."""
    lower = np.maximum(values, 0.0)
    slack = short * float(np.finfo(np.float64).eps) * float(lower[0])
    return LeadingValues(lower, {k: float(lower[:k].sum()) + k * slack for k in ranks}, vectors, 0)


def direct_work(long: int, short: int, ranks: Sequence[int], *, with_vectors: bool = True) -> float:
    """Foresee what :func:`direct_values` counts."""
    eigen = eigenpairs_work(short, _within(ranks, short)[-1], 8) if with_vectors else eigenvalues_work(short, 8)
    return gram_work(long, short, 8) + eigen


def _within(ranks: Sequence[int], short: int) -> list[int]:
    """The ranks that a matrix has; its full rank stands for what is beyond."""
    return sorted({min(k, short) for k in ranks})


def _sum_of_squares(values: Array, library: Library) -> float:
    wide = library.cast(values, np.float64)
    return float(library.home(library.xp.sum(wide**2)))


def _orthonormal(block: Array, floor: float, dtype: Any, library: Library) -> Array:
    """Orthonormal basis of a block's columns, without directions of a norm below `floor`."""
    wide = library.cast(block, np.float64)
    values, vectors = np.linalg.eigh(library.home(wide.T @ wide))
    kept = values > max(floor**2, 1e-30 * float(values[-1]))
    basis = wide @ library.put(vectors[:, kept] / np.sqrt(values[kept]))
    if values[0] > _NEAR * values[-1]:
        # So near to orthonormal that a Cholesky factor does the rest, at a fraction of the price of Householder's.
        factor = np.linalg.cholesky(library.home(basis.T @ basis))
        return library.cast(basis @ library.put(np.linalg.inv(factor).T), dtype)
    return library.cast(library.xp.linalg.qr(basis)[0], dtype)


class _Basis:
    """The Krylov space so far: Q, G Q, and on the host H = Q^T G Q."""

    def __init__(self, short: int, capacity: int, dtype: np.dtype[Any], library: Library) -> None:
        self._library, self._dtype = library, dtype
        self._vectors = library.zeros((short, capacity), dtype)
        self._wide = library.zeros((short, capacity), np.float64)  # the same, in float64
        self._images = library.zeros((short, capacity), dtype)
        self._met = np.empty((capacity, capacity))
        self._short, self._capacity = short, capacity
        self.size = self._newest = 0
        self._unit = float(np.finfo(dtype).eps)
        self._pairs: tuple[Float64, Float64] | None = None

    @property
    def full(self) -> bool:
        """Whether it is the whole space."""
        return self.size == self._short

    def add(self, block: Array, image: Array) -> None:
        """Take a block and what G makes of it."""
        first, stop, library = self.size, self.size + block.shape[1], self._library
        self._vectors[:, first:stop] = block
        self._images[:, first:stop] = image
        self.size, self._newest, self._pairs = stop, first, None
        self._wide[:, first:stop] = library.cast(block, np.float64)
        met = library.home(self._wide[:, :stop].T @ library.cast(image, np.float64))
        self._met[:stop, first:stop] = met
        self._met[first:stop, :stop] = met.T
        self._met[first:stop, first:stop] = (met[first:] + met[first:].T) / 2

    def deflate(self, block: Array, times: int = 1) -> Array:
        """The part of a block that is orthogonal to the space; once leaves rounding of what is taken away."""
        product, space = self._library.product, self._vectors[:, : self.size]
        for _ in range(times):
            block = block - product(space, product(space.T, block))
        return block

    def next_block(self, rest: Array) -> Array:
        """The next block from what is outside the space of the newest image; without columns if nothing is."""
        met = self._met[: self.size, : self.size]
        leading = met[:, np.argmax(np.diag(met))]
        for _ in range(4):
            leading = met @ (leading / (np.linalg.norm(leading) or 1.0))
        largest = float(np.linalg.norm(leading))  # or hardly less
        block = _orthonormal(rest, 16 * self._unit * largest, self._dtype, self._library)
        block = block[:, : min(self._capacity - self.size, block.shape[1])]
        # Once more: what was small before it was scaled up is not orthogonal any more.
        return _orthonormal(self.deflate(block), 0.5, self._dtype, self._library) if block.shape[1] else block

    def residual(self, rest: Array, wanted: int) -> float:
        """Largest residual of a wanted Ritz pair, as a share of its Ritz value; infinite if there are too few.

        `rest` is what is outside the space of the newest image: of the older ones nothing is, up to rounding.
        """
        if self.size < min(wanted, self._short):
            return float("inf")
        library = self._library
        values, vectors = self._ritz()
        wanted = min(wanted, self.size)
        outside = rest @ library.put(vectors[self._newest :, :wanted].astype(self._dtype))
        wide = library.cast(outside, np.float64)  # float32 may not hold their squares
        norms = np.sqrt(library.home(library.xp.sum(wide**2, axis=0)))
        floor = 16 * self._unit * float(values[0])
        return float((norms / np.maximum(values[:wanted], floor)).max())

    def result(self, ranks: Sequence[int], beyond: float, steps: int) -> LeadingValues:
        """Ritz values and the bound, with `beyond` the largest eigenvalue on the complement."""
        library, count = self._library, min(ranks[-1], self.size)
        values, coordinates = self._ritz()
        space, met = self._wide[:, : self.size], library.put(self._met[: self.size, : self.size])
        rest = space @ met
        rest -= self._images[:, : self.size]
        square = library.home(rest.T @ rest)
        vectors = library.cast(space @ library.put(coordinates[:, :count]), self._dtype)
        lower = np.zeros(ranks[-1])
        lower[:count] = np.maximum(values[:count], 0.0)
        # What rounding of the products may have taken from each eigenvalue, and from the first if all rows share its
        # direction.
        slack = self._unit * float(values[0])
        bounds = _bounds([min(k, count) for k in ranks], values, coordinates.T @ square @ coordinates, beyond)
        upper = {k: bound + (_COHERENT + 4 * k) * slack for k, bound in zip(ranks, bounds, strict=True)}
        return LeadingValues(lower, upper, vectors, steps)

    def _ritz(self) -> tuple[Float64, Float64]:
        """Ritz values, largest first, and the coordinates of their vectors in the basis."""
        if self._pairs is None:
            values, vectors = np.linalg.eigh(self._met[: self.size, : self.size])
            self._pairs = values[::-1], vectors[:, ::-1]
        return self._pairs


def _bounds(ranks: Sequence[int], values: Float64, square: Float64, beyond: float) -> Iterator[float]:
    """Yield bounds of the sums of so many eigenvalues, from Ritz values and ``R^T R`` in the basis of their vectors."""
    largest = math.sqrt(max(float(np.linalg.eigvalsh(square)[-1]), 0.0))
    for k in ranks:
        gap = float(values[k - 1]) - beyond
        loose = float(np.maximum(values[:k], beyond).sum()) + k * largest
        tight = float(np.linalg.eigvalsh(np.diag(values) + square / gap)[-k:].sum()) if gap > 0 else loose
        yield min(loose, tight)
