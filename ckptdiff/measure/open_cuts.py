"""Find cuts: the k-th largest |d| with the energy of the k largest, and the k-th smallest |W0|, exactly.

A scan leaves |d| and |W0| in bins of their leading 15 bits. The bin of |d| that holds a cut is resolved at once if all
its values are equal, as they usually are between bfloat16 sides, and by further passes if not; so is one of |W0| if its
format has more bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Format
from ckptdiff.measure.kernels.cuts import cut_from_bottom, cut_from_top, find_delta_cut, find_low_cut
from ckptdiff.measure.partial import BINS, Partial


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


@dataclass(frozen=True, slots=True)
class LowCut:
    """Where the ``rank``-th smallest |W0| lies."""

    rank: int
    """From 1."""
    prefix: int
    """The leading bits of its magnitude code that are known."""
    unknown: int
    """How many bits are not."""
    below: int
    at: int
    """How many weights have smaller leading bits, and how many these."""
    changed_below: int
    changed_at: int
    """How many of them changed."""

    @property
    def overlap(self) -> float:
        """Changed coordinates among the ``rank`` smallest weights; ties at the cut count fractionally (S1)."""
        share = (self.rank - self.below) / self.at if self.at else 0.0
        return self.changed_below + share * self.changed_at


def first_nan_bin(compare: Format) -> int:
    """First bin of ``Partial.weights`` that holds NaN."""
    return compare.nan if compare.bits <= 16 else BINS - 1


def first_low_cuts(partial: Partial, compare: Format, ranks: Sequence[int]) -> list[LowCut]:
    """Find cuts in the histogram of a scan, for ascending ranks; NaN weights are in no set."""
    bin_, last = int(partial.span[0]), min(int(partial.span[1]), first_nan_bin(compare) - 1)
    below, changed_below, cuts = 0, 0, []
    for rank in ranks:
        # Each search goes on where the one before it stopped.
        bin_, below, at, changed_below, changed_at = find_low_cut(
            partial.weights, bin_, last, rank, below, changed_below
        )
        unknown = max(compare.bits - 16, 0) if at else 0
        cuts.append(LowCut(rank, bin_, unknown, below, at, changed_below, changed_at))
    return cuts


def refine_low_cut(cut: LowCut, counts: NDArray[np.int64]) -> LowCut:
    """Narrow a cut by its next 16 bits, by which ``counts``, shape (2, 2**16), has all weights and the changed."""
    bin_, below = cut_from_bottom(counts[0], 0, counts.shape[1] - 1, cut.rank - cut.below)
    return replace(
        cut,
        prefix=cut.prefix << 16 | bin_,
        unknown=cut.unknown - 16,
        below=cut.below + below,
        at=int(counts[0, bin_]),
        changed_below=cut.changed_below + int(counts[1, :bin_].sum()),
        changed_at=int(counts[1, bin_]),
    )
