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
    shares = np.cumsum(found.lower) / delta_norm**2
    kept = int((found.lower > np.finfo(np.float32).eps ** 2 * found.lower[0]).sum())
    rank = max(1, min(kept, found.vectors.shape[1]))
    if energy is not None:
        rank = min(rank, int(np.searchsorted(shares, energy)) + 1)
    down = library.contiguous(library.cast(found.vectors[:, :rank], dtype))
    (projected,) = run_together(source, _moved(down, source))
    vectors, moved = library.home(down), library.home(projected)
    sizes = np.linalg.norm(moved.astype(np.float64), axis=0)
    roots = np.sqrt(np.where(sizes > 0, sizes, 1.0))
    lost = 1.0 - float(np.sum(sizes**2)) / delta_norm**2
    return Factors((moved / roots).astype(np.float32), (vectors * roots).astype(np.float32), max(lost, 0.0), delta_norm)


def update_norm(library: Library) -> Stage[float]:
    """One pass: the Frobenius norm of the update."""
    total = library.zeros((), np.float64)

    def add(panel: Panel) -> None:
        nonlocal total
        total = total + library.xp.sum(library.cast(panel.delta, np.float64) ** 2)

    yield add
    return math.sqrt(float(library.home(total)))


def factor_work(long: int, short: int, itemsize: int, most: int) -> tuple[float, int]:
    """Foresee what :func:`factorize` counts, as far as sizes tell, and how many passes it makes."""
    wanted, krylov = min(most, short), _krylov(short, most, 0)
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
    projected = source.library.zeros((source.long, vectors.shape[1]), source.dtype)
    done = 0

    def project(panel: Panel) -> None:
        nonlocal done
        rows = slice(done, done + panel.delta.shape[0])
        projected[rows, :] = source.library.product(panel.delta, vectors)
        done = rows.stop

    yield project
    return projected
