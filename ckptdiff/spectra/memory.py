"""What the spectra of a matrix take in memory. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from ckptdiff.linalg.angles import angle_rank
from ckptdiff.linalg.principal import principal_rank
from ckptdiff.metrics.catalogue import RHO
from ckptdiff.options import Options
from ckptdiff.spectra.matrices import MatrixView
from ckptdiff.spectra.source import PANEL

__all__ = ["Room", "cache_bytes", "default_bound", "exact_bytes", "randomized_bytes", "room_of"]

_DEFAULT = {"randomized": 1_000_000_000, "exact": 4_000_000_000}
"""Bound on the peak resident size where the user gave none; exact mode needs float64 copies of a Gram matrix."""


_USUAL = 300_000_000
"""What a process that runs nothing but ckptdiff holds before the spectra begin, at most."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that the spectra may take, in bytes.

    Attributes
    ----------
    bound : int
        On the whole process.
    taken : int
        What it holds before the spectra begin.
    """

    bound: int
    taken: int

    @property
    def free(self) -> int:
        """What is left."""
        return max(self.bound - self.taken, 0)


def room_of(options: Options, taken: int) -> Room:
    """The room of a run."""
    assert options.spectra is not None
    return Room(options.max_memory or default_bound(_DEFAULT[options.spectra.mode], taken), taken)


def default_bound(bound: int, taken: int) -> int:
    """The bound where the user gave none: what a larger program holds already does not count against it."""
    return bound + max(taken - _USUAL, 0)


def cache_bytes(view: MatrixView, itemsize: int) -> int:
    """Bytes of a decoded pair."""
    return 2 * itemsize * view.long * view.short


def randomized_bytes(view: MatrixView, itemsize: int, krylov: int) -> int:
    """Work space of randomized mode, beside a decoded pair.

    The Gram matrix with the eigenvectors it gives, then the products of the projection with their float64 copies.
    """
    short, rank = view.short, principal_rank(RHO[-1], view.short) + 1
    leading = 2 * (itemsize + 8) * short * min(krylov, short) if short > 2 * krylov else 16 * short * short
    decomposed = itemsize * short * short + 3 * itemsize * short * rank
    projected = (3 * itemsize + 24) * short * rank + 40 * rank * rank
    return leading + max(decomposed, projected) + _panels(view, itemsize)


def exact_bytes(view: MatrixView, together: bool) -> int:
    """Work space of exact mode, beside a decoded pair."""
    short = view.short
    vectors = principal_rank(RHO[-1], short) + angle_rank(short) + 2
    return 8 * short * short * (6 if together else 4) + 6 * 8 * short * vectors + _panels(view, 8)


def _panels(view: MatrixView, itemsize: int) -> int:
    """A panel of both sides with its raw bytes, and what is computed from it."""
    return 10 * itemsize * max(PANEL, view.short)
