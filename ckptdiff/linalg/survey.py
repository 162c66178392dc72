"""Make the first pass over a pair: norms, changed entries, and where the smallest base weights end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptdiff.linalg.library import Counts, Library
from ckptdiff.linalg.on_numpy import NUMPY
from ckptdiff.linalg.stages import Panel, Stage
from ckptdiff.linalg.threads import counted
from ckptdiff.measure.thresholds import exactly

SMALL_CHANGE = 1e-5
"""The threshold of the second support (S1)."""
SURVEY_WORK = 500.0
"""The work of an entry."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Norms and counts of a pair, from one pass."""

    numel: int
    base_norm: float
    delta_norm: float
    """Frobenius norms, summed in float64; NaN or infinite if an entry is."""
    weights: NDArray[np.int64]
    changed: NDArray[np.int64]
    large: NDArray[np.int64]
    """Entries by magnitude of W0, those with d != 0, and those with |d| > 1e-5; shape (32768,)."""

    @property
    def support(self) -> int:
        """Entries with d != 0."""
        return int(self.changed.sum())

    @property
    def above(self) -> int:
        """Entries with |d| > 1e-5."""
        return int(self.large.sum())

    def low_coverage_above(self, rho: float) -> float:
        """Share of the entries with |d| > 1e-5 among the ceil(rho N) smallest |W0| (S1), NaN if there are none."""
        ((cut, beyond),) = self.low_cuts([rho])
        among = self.large[:cut].sum() + (1.0 - beyond) * self.large[cut]
        return float(among / self.above) if self.above else math.nan

    def low_cuts(self, rhos: Sequence[float]) -> Iterator[tuple[int, float]]:
        """Magnitude at which the ceil(rho N) smallest end, and the share of its entries beyond them, for each rho.

        Ties at the cut count fractionally. Exact where a magnitude bin holds one value, as under bfloat16; for wider
        formats all of the boundary bin counts as tied.
        """
        up_to = np.cumsum(self.weights)
        for rho in rhos:
            rank = max(1, math.ceil(exactly(rho) * self.numel))
            cut = int(np.searchsorted(up_to, rank))
            yield cut, float((up_to[cut] - rank) / self.weights[cut])


def survey(library: Library = NUMPY) -> Stage[Survey]:
    """One pass over a pair, which adds up norms, and counts entries by their magnitudes."""
    (found,) = yield from survey_of_each(library)
    return found


def survey_of_each(library: Library, stack: tuple[int, ...] = (), members: int = 1) -> Stage[list[Survey]]:
    """The same over the first `members` pairs of a stack."""
    squares = [library.zeros(stack, np.float64) for _ in range(2)]
    filled = (slice(members),) if stack else ()
    counts: Counts = None
    numel = 0

    def add(panel: Panel) -> None:
        nonlocal counts, numel
        rows, short = panel.base.shape[-2:]
        with counted(SURVEY_WORK * rows * short * members):
            for side, values in enumerate((panel.base, panel.delta)):
                squares[side] = squares[side] + library.squares(values)
            numel += rows * short
            sides = panel.base[*filled, ...], panel.delta[*filled, ...]
            counts = library.count_magnitudes(counts, *sides, SMALL_CHANGE)

    yield add
    base, delta = (np.sqrt(library.home(square)).reshape(-1)[:members].tolist() for square in squares)
    found = zip(base, delta, library.magnitudes(counts), strict=True)
    return [Survey(numel, weight, change, *kinds) for weight, change, kinds in found]
