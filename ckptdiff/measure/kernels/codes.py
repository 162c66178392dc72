"""Measure one tile of a compare format of 8 or 16 bits, whose codes index a table of values."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bfloat16 import bf16_to_f32
from ckptdiff.codes.bits import bits_float
from ckptdiff.codes.lanes import count_lanes
from ckptdiff.jit import helper
from ckptdiff.measure.kernels.changed import (
    count_nonfinite,
    count_strange,
    first_of,
    gather_marked,
    keep_finite,
    mark_rest,
    mark_word,
    rows_of,
)
from ckptdiff.measure.kernels.deltas import count_deltas, count_distances, summarise, widen_span
from ckptdiff.measure.kernels.masks import mask_tile, open_mask
from ckptdiff.measure.kernels.tiles import Array, Facts, Measure, Tile, Totals
from ckptdiff.measure.partial import Count

CHANGED, NONFINITE_TUNED = int(Count.CHANGED), int(Count.NONFINITE_TUNED)


@helper
def note_bins(codes: Array, magnitude: Any, span: Array) -> None:
    """Note in a span, shape (4,), which bins of ``weights`` codes, shape (n,), fall into."""
    smallest, largest = codes.dtype.type(0xFFFF), codes.dtype.type(0)
    for i in range(codes.size):
        code = codes.dtype.type(codes[i] & magnitude)
        smallest = code if code < smallest else smallest
        largest = code if code > largest else largest
    widen_span(span, 0, int(smallest), int(largest))


@helper
def find_bins(counts: Array, span: Array) -> None:
    """Find which bins of a histogram, shape (bins,), are in use: cheaper than to look at each of millions of codes."""
    first, last = 0, counts.size - 1
    while first < counts.size and counts[first] == 0:
        first += 1
    while last >= 0 and counts[last] == 0:
        last -= 1
    widen_span(span, 0, first, last)


@helper
def count_and_mark(a: Array, b: Array, magnitude: Any, tile: Tile, weights: Array) -> None:
    """Do as ``mark_changed``, and add the magnitudes of all base codes to the first row of ``weights``, (3, BINS).

    In one loop: a core stores once a cycle, and has time to compare codes while it counts them.
    """
    left, right = rows_of(a, b)
    for j in range(len(left)):
        tile.marks[j] = mark_word(left, right, j, np.uint16(magnitude))
        count_lanes(left, j, magnitude, weights)
    for i in range(left.size, a.size):
        weights[0, a[i] & magnitude] += 1
    mark_rest(a, b, np.uint16(magnitude), tile)


@helper
def take_values(values: Array, tile: Tile) -> None:
    """Values and d of changed codes."""
    if values.size == 0:  # bfloat16: a code is the upper half of its float32
        for j in range(tile.delta.size):
            base, tuned = bits_float(bf16_to_f32(tile.left[j])), bits_float(bf16_to_f32(tile.right[j]))
            tile.base[j], tile.tuned[j], tile.delta[j] = base, tuned, tuned - base
    else:
        for j in range(tile.delta.size):
            base, tuned = values[tile.left[j]], values[tile.right[j]]
            tile.base[j], tile.tuned[j], tile.delta[j] = base, tuned, tuned - base


@helper
def count_into(row: int, codes: Array, magnitude: Any, weights: Array) -> None:
    """Add the magnitudes of codes, shape (n,), to one row of ``weights``, shape (3, BINS)."""
    for j in range(codes.size):
        weights[row, codes[j] & magnitude] += 1


@helper
def count_lost(tile: Tile, magnitude: Any, weights: Array) -> None:
    """Histogram of the base magnitudes whose d is not finite, in the last row of ``weights``, shape (3, BINS)."""
    for j in range(tile.delta.size):
        if not abs(tile.delta[j]) < np.inf:
            weights[2, tile.left[j] & magnitude] += 1


@helper
def measure_distances(left: Array, right: Array, magnitude: Any, distance: Array) -> None:
    """Distances of codes, shape (n,), in the monotone integer order of their format, in which +0 and -0 are one."""
    for j in range(left.size):  # in 16 bits, twice as many to a register as Numba would take
        x_size, y_size = np.int16(left[j] & magnitude), np.int16(right[j] & magnitude)
        x = x_size if left[j] <= magnitude else np.int16(-x_size)
        y = y_size if right[j] <= magnitude else np.int16(-y_size)
        distance[j] = np.uint16(max(x, y) - min(x, y))


@helper
def measure_codes(
    a: Array, b: Array, facts: Facts, tile: Tile, measure: Measure, totals: Totals, sums: Array, words: Array
) -> None:
    """Measure one tile; parameters and shapes as in :func:`~ckptdiff.measure.kernels.span.measure_tile`."""
    magnitude, infinite = np.uint16(facts.magnitude), np.uint16(facts.infinite)
    count_and_mark(a, b, facts.magnitude, tile, totals.weights)
    changed = gather_marked(a, b, tile)
    open_mask(tile, measure, a.size)
    found = first_of(tile, changed)
    take_values(facts.values, found)
    totals.counts[CHANGED] += changed
    count_into(1, found.left, facts.magnitude, totals.weights)
    if count_strange(found.delta) > 0:
        count_lost(found, facts.magnitude, totals.weights)
        if measure.native:  # beyond the base's own, which its histogram tells
            gained = count_nonfinite(found.right, magnitude, infinite)
            totals.counts[NONFINITE_TUNED] += gained - count_nonfinite(found.left, magnitude, infinite)
        found = first_of(tile, keep_finite(found))
    extremes = count_deltas(found.delta, np.uint32(0x7FFF_FFFF), np.uint32(16), totals)
    measure_distances(found.left, found.right, magnitude, found.distance)
    count_distances(found)
    summarise(found, extremes, measure, totals, sums)
    mask_tile(found, measure, changed, totals, sums, words)
