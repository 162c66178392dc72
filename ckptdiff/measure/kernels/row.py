"""Make the figures of one tensor of its totals, as far as a single scan tells them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ckptdiff.codes.bfloat16 import bf16_to_f32
from ckptdiff.codes.bits import bits_float
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.cuts import Groups, find_delta_cut, find_low_cut, regroup, within_bins
from ckptdiff.measure.kernels.null import Gaps, fit_null, null_overlap
from ckptdiff.measure.kernels.tiles import Array, Facts, Totals
from ckptdiff.measure.partial import Count

__all__ = ["Wanted", "base_sums", "take_figures"]

CHANGED, OFF_GRID = int(Count.CHANGED), int(Count.OFF_GRID)


class Wanted(NamedTuple):
    """What to find in the histograms of a tensor of at most 16 bits, and the tables that it takes."""

    taus: Array
    """Thresholds in units of RMS(W0), float64."""
    nan: int
    """First bin of ``weights`` that holds NaN."""
    delta_groups: Groups
    """Log2 bins of the bins of ``deltas`` and of ``weights``."""
    base_groups: Groups
    gaps: Gaps


@kernel
def base_sums(weights: Array, first: int, last: int, facts: Facts) -> tuple[int, float]:
    """Coordinates with finite d, and the sum of W0^2 over them, from a histogram of codes of at most 16 bits."""
    finite, square = 0, 0.0
    stop: Any = np.int64(facts.infinite)
    for code in range(first, min(last + 1, stop)):
        count = weights[0, code] - weights[2, code]
        if count == 0:
            continue
        bf16 = facts.values.size == 0
        value = np.float64(bits_float(bf16_to_f32(code)) if bf16 else facts.values[code])
        finite += count
        square += count * value * value
    return finite, square


@helper
def take_null(totals: Totals, ranks: Array, last: int, wanted: Wanted, nulls: Array) -> None:
    """The rounding null for ranks of shape (k,), into ``nulls``, shape (k,); what stays NaN is undefined."""
    first = totals.span[0]
    all_, changed = 0, 0
    for code in range(first, last + 1):
        all_ += totals.weights[0, code]
        changed += totals.weights[1, code]
    if not 0 < changed < all_:
        return
    weights = totals.weights[0]
    sigma = fit_null(weights, wanted.gaps, first, last, changed)
    total = null_overlap(weights, wanted.gaps, first, last, sigma, ranks, nulls)
    for r in range(nulls.size):
        nulls[r] /= total


@helper
def take_figures(
    totals: Totals, ranks: tuple[Array, Array], facts: Facts, wanted: Wanted, row: int, records: Any
) -> None:
    """Fill one row from the totals of a whole tensor of one block, of a compare format of at most 16 bits.

    Parameters
    ----------
    totals : Totals
    ranks : pair of int64 array, shapes (percentages,) and (fractions,)
        How many of the largest |d|, and how many of the smallest weights, ascending.
    facts : Facts
    wanted : Wanted
    row : int
    records : Records
        ``complete`` tells whether all cuts could be found.
    """
    first, last = totals.span[0], min(totals.span[1], wanted.nan - 1)
    finite, square = base_sums(totals.weights, first, totals.span[1], facts)
    records.finite[row], records.base_square[row] = finite, square
    complete = True
    for r in range(ranks[0].size):
        value, unknown, above, at, energy = find_delta_cut(totals.deltas, totals.span, ranks[0][r], 32)
        complete &= unknown == 0
        if at > 0 and unknown == 0:
            energy += (ranks[0][r] - above) * np.float64(bits_float(np.uint32(value))) ** 2
        records.energies[row, r] = energy
    rms = np.sqrt(square / finite) if finite > 0 else 0.0
    for t in range(wanted.taus.size):
        within = within_bins(totals.deltas, totals.span, wanted.taus[t] * rms, 32)
        complete &= within >= 0
        records.within_rel[row, t] = within
    support = 0
    for code in range(first, last + 1):
        support += totals.weights[1, code]
    records.support[row] = support
    bin_, below, changed_below = first, 0, 0
    for r in range(ranks[1].size):
        bin_, below, at, changed_below, changed_at = find_low_cut(
            totals.weights, bin_, last, ranks[1][r], below, changed_below
        )
        share = (ranks[1][r] - below) / at if at > 0 else 0.0
        records.overlaps[row, r] = changed_below + share * changed_at
    if totals.counts[OFF_GRID] == 0:
        take_null(totals, ranks[1], min(last, np.int64(facts.infinite) - 1), wanted, records.nulls[row])
    regroup(totals.deltas[0], wanted.delta_groups, totals.span[2], totals.span[3], records.delta_log2[row])
    regroup(totals.weights[0], wanted.base_groups, first, totals.span[1], records.base_log2[row])
    regroup(totals.weights[1], wanted.base_groups, first, totals.span[1], records.changed_log2[row])
    moved = 0
    for k in range(totals.ulp.size):
        records.ulp[row, k] = totals.ulp[k]
        moved += totals.ulp[k]
    records.delta_log2[row, 0] += np.uint64(finite - moved)
    records.complete[row] = complete
