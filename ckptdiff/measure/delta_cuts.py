"""Find cuts in |d|: the k-th largest value, and the energy of the k largest, exactly.

A scan leaves |d| in bins of its leading 15 bits. The bin that holds a cut is resolved at once if all its values are
equal, as they usually are between bfloat16 sides, and by further passes if not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.measure.kernels.cuts import cut_from_top, find_delta_cut
from ckptdiff.measure.partial import Partial


@dataclass(frozen=True, slots=True)
class DeltaCut:
    """Where the ``rank``-th largest |d| lies."""

    rank: int
    """From 1."""
    width: int
    """Bits of d: 32 or 64."""
    prefix: int
    """The leading bits of the value that are known."""
    unknown: int
    """How many bits are not."""
    above: int
    """How many |d| have larger leading bits."""
    at: int
    """How many have these; 0 if fewer than ``rank`` coordinates changed."""
    energy_above: float
    """Sum d^2 over those above; means nothing for a d of 64 bits."""

    @property
    def value(self) -> float:
        """The ``rank``-th largest |d|, once no bit is unknown; 0 if fewer coordinates changed."""
        return float(_values(self.prefix, self.width)[0])

    def energy(self, above: float | None = None) -> float:
        """Sum of the ``rank`` largest d^2, given the sum above the cut where the scan cannot know it."""
        rest = self.rank - self.above if self.at else 0
        return (self.energy_above if above is None else above) + rest * self.value * self.value


def first_delta_cut(partial: Partial, width: int, rank: int) -> DeltaCut:
    """Find a cut in the histogram of a scan."""
    return DeltaCut(rank, width, *find_delta_cut(partial.deltas, partial.span, rank, width))


def refine_delta_cut(cut: DeltaCut, counts: NDArray[np.int64]) -> DeltaCut:
    """Narrow a cut by its next 16 bits, by which ``counts``, shape (2**16,), has the changed coordinates."""
    bin_, above = cut_from_top(counts, 0, counts.size - 1, cut.rank - cut.above)
    energy = cut.energy_above
    if cut.width == 32:
        higher = np.flatnonzero(counts[bin_ + 1 :]) + bin_ + 1
        energy += float(np.sum(counts[higher] * _values(higher + (cut.prefix << 16), 32) ** 2))
    return replace(
        cut,
        prefix=cut.prefix << 16 | bin_,
        unknown=cut.unknown - 16,
        above=cut.above + above,
        at=int(counts[bin_]),
        energy_above=energy,
    )


def _values(bits: Any, width: int) -> NDArray[np.float64]:
    """Values of the bits of |d|."""
    codes = np.atleast_1d(np.asarray(bits, np.uint64))
    return codes.astype(np.uint32).view(np.float32).astype(np.float64) if width == 32 else codes.view(np.float64)
