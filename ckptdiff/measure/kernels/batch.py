"""Measure many small tensors in one call, from their bytes to their figures.

A checkpoint of experts holds tens of thousands of tensors; what Python does for each costs more than to measure it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.fetch import Side
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.row import Wanted, take_row
from ckptdiff.measure.kernels.span import Workspace, scan_span
from ckptdiff.measure.kernels.stored import Stored
from ckptdiff.measure.kernels.tiles import Array, Facts, Measure, Totals
from ckptdiff.measure.partial import BINS, Count

CHANGED, STORED_EQUAL = int(Count.CHANGED), int(Count.STORED_EQUAL)
NONFINITE_BASE, NONFINITE_TUNED = int(Count.NONFINITE_BASE), int(Count.NONFINITE_TUNED)


@helper
def fill(target: Array) -> None:
    """Set to zero."""
    for i in range(target.size):
        target[i] = 0


@helper
def clear(totals: Totals) -> None:
    """Set to nothing seen, touching only the bins in use."""
    # By slices: an index of two parts keeps the compiler from a fill, and it scatters zeros one by one.
    for row in range(3):
        fill(totals.weights[row, totals.span[0] : totals.span[1] + 1])
        fill(totals.deltas[row, totals.span[2] : totals.span[3] + 1])
    totals.span[0], totals.span[1], totals.span[2], totals.span[3] = BINS, -1, BINS, -1
    fill(totals.counts)
    fill(totals.within)
    fill(totals.sums[0])
    fill(totals.ulp)
    totals.max_abs[0] = 0.0


@helper
def count_native(totals: Totals, numel: int, infinite: Any) -> None:
    """The counts of what is stored, where both sides are stored as compared."""
    strange: Any = 0
    for code in range(np.int64(infinite), totals.span[1] + 1):
        strange += totals.weights[0, code]
    totals.counts[STORED_EQUAL] += numel - totals.counts[CHANGED]
    totals.counts[NONFINITE_BASE] += strange
    totals.counts[NONFINITE_TUNED] += strange


@kernel
def scan_small(
    sides: tuple[Side, Side],
    stored: tuple[Stored, Stored] | None,
    sizes: Array,
    ranks: tuple[Array, Array],
    tables: tuple[Facts, Wanted],
    measure: Measure,
    room: tuple[Workspace, Totals],
    out: tuple[Any, Array],
) -> int:
    """Measure whole tensors of at most a block, of a compare format of at most 16 bits; returns how many.

    Less than all if one could not be read. Each run of ``sides`` is a whole tensor; ``sizes``, int64 of shape (k, 2),
    has its coordinates and its first word of mask, and ``ranks``, int64 of shape (k, ...), the sizes of its sets of
    largest |d| and of smallest weights. ``room`` has totals of nothing seen, which are left so. k rows of records and
    words, uint64, receive figures and masks.
    """
    (base, tuned), (work, totals), (records, words) = sides, room, out
    for row in range(len(sizes)):
        numel, word = sizes[row]
        pair = (
            Side(base.runs[row : row + 1], base.room, base.itemsize),
            Side(tuned.runs[row : row + 1], tuned.room, tuned.itemsize),
        )
        mask = words[word : word + (numel + 63) // 64]
        came = scan_span(pair, stored, (0, numel), tables[0], work, measure, totals, mask)
        if came < numel:
            clear(totals)
            return row
        if measure.native:
            count_native(totals, numel, tables[0].infinite)
        take_row(totals, ranks, tables, row, records)
        clear(totals)
    return len(sizes)
