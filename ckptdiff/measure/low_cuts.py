"""Find cuts in |W0|: the k smallest weights, and the expected number of changed coordinates among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ckptdiff.formats import Format
from ckptdiff.measure.kernels.cuts import cut_from_bottom, find_low_cut
from ckptdiff.measure.partial import BINS, Partial


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
