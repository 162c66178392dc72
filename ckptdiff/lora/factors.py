"""Find the best low-rank factors of a streamed update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.krylov import (
    KrylovOptions,
    direct_values,
    direct_work,
    krylov_passes,
    krylov_values,
    krylov_work,
)
from ckptdiff.linalg.library import Array, Library
from ckptdiff.linalg.stages import Panel, PanelSource, Stage, run_together
from ckptdiff.linalg.symmetric import eigh_top, gram_of
from ckptdiff.linalg.work import product_work
from ckptdiff.spectra.matrices import MatrixView

_BLOCK, _STEPS = 32, 10


@dataclass(frozen=True, slots=True)
class Factors:
    """``long_side @ short_side.T`` is the update cut to a rank."""

    long_side: NDArray[np.float32]
    """Shape (long, rank)."""
    short_side: NDArray[np.float32]
    """Shape (short, rank)."""
    lost: float
    """Share of the update's energy, sum d^2, that the rank leaves out."""
    norm: float
    """Of the update."""

    def of(self, view: MatrixView) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """``(down, up)`` of a matrix, of shapes (rank, columns) and (rows, rank): it is ``up @ down``."""
        up, down = (self.short_side, self.long_side) if view.wide else (self.long_side, self.short_side)
        return down.T, up

    @property
    def rank(self) -> int:
        """Columns of both factors."""
        rank: int = self.short_side.shape[1]
        return rank


def factorize(source: PanelSource, delta_norm: float, most: int, energy: float | None, seed: int) -> Factors:
    """Find factors with the randomized SVD of the update, in one more pass than that takes.

    The singular values are split evenly between both factors, so that neither needs a range the other lacks. Of ranks
    up to `most` the smallest is taken that holds a share `energy` of ``delta_norm**2``, if one does.
    """
    library, dtype = source.library, source.dtype
    wanted, krylov = min(most, source.short), _krylov(source.short, most, seed)
    if krylov is None:
        leading = direct_values(source.short, (wanted,), library=library)
    else:
        leading = krylov_values(source.short, (wanted,), dtype, krylov, library)
    (found,) = run_together(source, leading)
    rank = min(_rank(found.lower, delta_norm, energy), max(1, found.vectors.shape[1]))
    down = library.contiguous(library.cast(found.vectors[:, :rank], dtype))
    (projected,) = run_together(source, _moved(down, source))
    return _split(library.home(down), library.home(projected), delta_norm)


def factorize_each(source: PanelSource, members: int, most: int, energy: float | None) -> list[Factors | None]:
    """The same of the first `members` updates of a stack, from their Gram matrices; None of one that is zero."""
    library, wanted = source.library, min(most, source.short)
    squares, (found, vectors) = run_together(source, _squares_of_each(source), _leading_of_each(source, wanted))
    down = library.contiguous(library.cast(vectors, source.dtype))
    (projected,) = run_together(source, _moved(down, source))
    values, vectors, moved = map(library.home, (found, down, projected))
    factors: list[Factors | None] = []
    for member, norm in enumerate(np.sqrt(squares[:members]).tolist()):
        rank = _rank(np.maximum(values[member], 0.0), norm, energy) if norm else 0
        factors.append(_split(vectors[member, :, :rank], moved[member, :, :rank], norm) if norm else None)
    return factors


def _rank(lower: NDArray[np.float64], delta_norm: float, energy: float | None) -> int:
    """Of the leading eigenvalues so many that are no noise, or fewer that hold enough."""
    rank = max(1, int((lower > np.finfo(np.float32).eps ** 2 * lower[0]).sum()))
    if energy is not None:
        rank = min(rank, int(np.searchsorted(np.cumsum(lower) / delta_norm**2, energy)) + 1)
    return rank


def _split(vectors: NDArray[np.floating], moved: NDArray[np.floating], delta_norm: float) -> Factors:
    """Factors of ``d V V^T``, of V and ``d V``."""
    sizes = np.linalg.norm(moved.astype(np.float64), axis=0)
    roots = np.sqrt(np.where(sizes > 0, sizes, 1.0))
    lost = 1.0 - float(np.sum(sizes**2)) / delta_norm**2
    return Factors((moved / roots).astype(np.float32), (vectors * roots).astype(np.float32), max(lost, 0.0), delta_norm)


def _squares_of_each(source: PanelSource) -> Stage[NDArray[np.float64]]:
    """One pass: ``norm(d)^2`` of each update of a stack."""
    total = source.library.zeros(source.stack, np.float64)

    def add(panel: Panel) -> None:
        nonlocal total
        total = total + source.library.squares(panel.delta)

    yield add
    return source.library.home(total)


def _leading_of_each(source: PanelSource, wanted: int) -> Stage[tuple[Array, Array]]:
    """One pass: leading eigenpairs of ``d^T d`` of each update of a stack."""
    gram = yield from gram_of("delta", source.short, np.float64, source.library, source.stack)
    return eigh_top(gram, wanted, source.library)


def update_norm(library: Library) -> Stage[float]:
    """One pass: the Frobenius norm of the update."""
    total = library.zeros((), np.float64)

    def add(panel: Panel) -> None:
        nonlocal total
        total = total + library.xp.sum(library.cast(panel.delta, np.float64) ** 2)

    yield add
    return math.sqrt(float(library.home(total)))


def factor_work(long: int, short: int, itemsize: int, most: int, directly: bool = False) -> tuple[float, int]:
    """Foresee what :func:`factorize` counts, as far as sizes tell, and how many passes it makes.

    Or what is counted of an update in a stack, whose leading values are found `directly`.
    """
    wanted, krylov = min(most, short), None if directly else _krylov(short, most, 0)
    moved = product_work(long, short, wanted, itemsize)
    if krylov is None:
        return moved + direct_work(long, short, (wanted,)), 2
    return moved + krylov_work(long, short, itemsize, krylov), 1 + krylov_passes(short, krylov)


def krylov_block(wanted: int) -> int:
    """Vectors of a Krylov block that finds so many singular vectors."""
    return max(_BLOCK, math.ceil(wanted / 4))


def _krylov(short: int, most: int, seed: int) -> KrylovOptions | None:
    """How the leading values are found: in a Krylov space, or directly where that is quicker."""
    block = krylov_block(min(most, short))
    return None if short <= 2 * block * _STEPS else KrylovOptions(block, _STEPS, seed=seed)


def _moved(vectors: Array, source: PanelSource) -> Stage[Array]:
    """One pass: ``d V``."""
    projected = source.library.zeros((*source.stack, source.long, vectors.shape[-1]), source.dtype)
    done = 0

    def project(panel: Panel) -> None:
        nonlocal done
        rows = slice(done, done + panel.delta.shape[-2])
        projected[..., rows, :] = source.library.product(panel.delta, vectors)
        done = rows.stop

    yield project
    return projected
