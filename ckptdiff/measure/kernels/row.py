"""Make the row of figures of one tensor of its totals, as far as a single scan tells them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ckptdiff.codes.bfloat16 import bf16_to_f32
from ckptdiff.codes.bits import bits_float
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.cuts import Groups, count_run, find_delta_cut, find_low_cut, regroup, within_bins
from ckptdiff.measure.kernels.null import Gaps, fit, gather, left_unchanged, null_overlap
from ckptdiff.measure.kernels.tiles import Array, Facts, Totals
from ckptdiff.measure.partial import Count, Sum

CHANGED, FINITE, OFF_GRID = int(Count.CHANGED), int(Count.FINITE), int(Count.OFF_GRID)
BASE_SQUARE, DELTA_SQUARE = int(Sum.BASE_SQUARE), int(Sum.DELTA_SQUARE)


class Wanted(NamedTuple):
    """What to find in the histograms of a tensor, and the tables that it takes."""

    taus: Array
    """Thresholds in units of RMS(W0), float64."""
    nan: int
    """First bin of ``weights`` that holds NaN."""
    width: int
    """Bits of d: 32 or 64."""
    below: int
    """Bits of |W0| that a bin of ``weights`` leaves open: 0 for formats of at most 16 bits."""
    delta_groups: Groups
    """Log2 bins of the bins of ``deltas`` and of ``weights``."""
    base_groups: Groups
    gaps: Gaps
    """Of bins of ``weights`` whose values are finite."""


@helper
def base_sums(weights: Array, first: int, last: int, facts: Facts) -> tuple[int, float]:
    """Coordinates with finite d, and the sum of W0^2 over them, from a histogram of codes of at most 16 bits."""
    stop: Any = min(last + 1, np.int64(facts.infinite))
    finite = count_run(weights[0], first, stop) - count_run(weights[2], first, stop)
    bf16, square = facts.values.size == 0, 0.0
    for code in range(first, stop):
        # Empty bins add nothing: to leave them out takes longer.
        count = weights[0, code] - weights[2, code]
        value = np.float64(bits_float(bf16_to_f32(code)) if bf16 else facts.values[code])
        square += count * value * value
    return finite, square


@helper
def take_null(totals: Totals, ranks: Array, wanted: Wanted, row: int, records: Any) -> None:
    """The rounding nulls of one row, whose sums are filled, for ranks of shape (k,); what stays NaN is undefined."""
    first, last = totals.span[0], min(totals.span[1], wanted.gaps.up.size - 1)
    weights, gaps = totals.weights[0], wanted.gaps
    strange = count_run(weights, last + 1, totals.span[1] + 1)
    square = records.sums[row, DELTA_SQUARE]
    steps, sizes = np.empty(2 * gaps.runs.size), np.zeros(2 * gaps.runs.size)
    top, total = gather(weights, gaps, first, last, steps, sizes)
    if total + strange == 0 or not square < np.inf:
        return
    off = min(totals.counts[OFF_GRID] / total, 1.0) if total > 0 else 0.0  # what the cast made infinite is off it too
    records.still[row] = strange + left_unchanged(steps, sizes, top, total, square, off)
    changed = count_run(totals.weights[1], first, last + 1)
    if wanted.below > 0 or not 0 < changed < total:
        return
    sigma = fit(steps, sizes, top, total, changed, off)
    nulls = records.nulls[row]
    moved = null_overlap(weights, gaps, first, last, sigma, off, ranks, nulls)
    for r in range(nulls.size):
        nulls[r] /= moved


@helper
def take_figures(
    totals: Totals, ranks: tuple[Array, Array], tables: tuple[Facts, Wanted], row: int, records: Any
) -> None:
    """Fill the figures of one row, whose counts and sums are filled; ``complete`` tells whether all cuts were found.

    ``ranks``, int64 of shapes (percentages,) and (fractions,), tell how many of the largest |d| and of the smallest
    weights, ascending.
    """
    facts, wanted = tables
    first, last = totals.span[0], min(totals.span[1], wanted.nan - 1)
    if wanted.below > 0:
        finite, square = records.counts[row, FINITE], records.sums[row, BASE_SQUARE]
    else:
        finite, square = base_sums(totals.weights, first, totals.span[1], facts)
    records.finite[row], records.base_square[row] = finite, square
    # The energies of a d of 64 bits take a pass of their own.
    complete = wanted.width == 32 or totals.counts[CHANGED] == 0
    for r in range(ranks[0].size):
        value, unknown, above, at, energy = find_delta_cut(totals.deltas, totals.span, ranks[0][r], wanted.width)
        complete &= unknown == 0
        if at > 0 and unknown == 0:
            energy += (ranks[0][r] - above) * np.float64(bits_float(np.uint32(value))) ** 2
        records.energies[row, r] = energy
    rms = np.sqrt(square / finite) if finite > 0 else 0.0
    for t in range(wanted.taus.size):
        within = within_bins(totals.deltas, totals.span, wanted.taus[t] * rms, wanted.width)
        complete &= within >= 0
        records.within_rel[row, t] = within
    records.support[row] = count_run(totals.weights[1], first, last + 1)
    bin_, below, changed_below = first, 0, 0
    for r in range(ranks[1].size):
        bin_, below, at, changed_below, changed_at = find_low_cut(
            totals.weights, bin_, last, ranks[1][r], below, changed_below
        )
        complete &= at == 0 or wanted.below == 0
        share = (ranks[1][r] - below) / at if at > 0 else 0.0
        records.overlaps[row, r] = changed_below + share * changed_at
    take_null(totals, ranks[1], wanted, row, records)
    regroup(
        totals.deltas[0].view(np.int64), wanted.delta_groups, totals.span[2], totals.span[3], records.delta_log2[row]
    )
    regroup(totals.weights[0], wanted.base_groups, first, totals.span[1], records.base_log2[row])
    regroup(totals.weights[1], wanted.base_groups, first, totals.span[1], records.changed_log2[row])
    moved = 0
    for k in range(totals.ulp.size):
        records.ulp[row, k] = totals.ulp[k]
        moved += totals.ulp[k]
    records.delta_log2[row, 0] += np.uint64(finite - moved)
    records.complete[row] = complete


@helper
def take_row(totals: Totals, ranks: tuple[Array, Array], tables: tuple[Facts, Wanted], row: int, records: Any) -> None:
    """Do as ``fill_row`` within another kernel."""
    # Loops: an assignment of arrays would compile its error messages too, for seconds.
    for i in range(totals.counts.size):
        records.counts[row, i] = totals.counts[i]
    for i in range(totals.within.size):
        records.within[row, i] = totals.within[i]
    for block in range(len(totals.sums)):
        for i in range(records.sums.shape[1]):
            records.sums[row, i] += totals.sums[block, i]
    records.max_abs[row] = totals.max_abs[0]
    take_figures(totals, (ranks[0][row], ranks[1][row]), tables, row, records)


@kernel
def fill_row(totals: Totals, ranks: tuple[Array, Array], tables: tuple[Facts, Wanted], row: int, records: Any) -> None:
    """Fill one row from the totals of a whole tensor, the sums of whose blocks are added in order.

    ``ranks``, int64 of shape (k, ...), tell for each row how many of the largest |d| and of the smallest weights,
    ascending. Of k records, nothing is known yet in this one. ``complete`` tells whether all is known then; if not,
    ``within_rel`` is -1 where the scan cannot tell, and ``energies`` and ``overlaps`` mean nothing.
    """
    take_row(totals, ranks, tables, row, records)
