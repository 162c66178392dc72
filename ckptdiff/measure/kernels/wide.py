"""Measure one tile of a compare format of 32 or 64 bits, whose codes are NumPy floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.ordered_sums import sum_of_squares
from ckptdiff.jit import helper
from ckptdiff.measure.kernels.changed import count_nonfinite, count_strange, find_changed, first_of, keep_finite
from ckptdiff.measure.kernels.deltas import count_deltas, count_distances, summarise, widen_span
from ckptdiff.measure.kernels.masks import mask_tile, open_mask
from ckptdiff.measure.kernels.tiles import Array, Facts, Measure, Tile, Totals
from ckptdiff.measure.partial import BINS, Count, Sum

CHANGED, FINITE, BASE_SQUARE = int(Count.CHANGED), int(Count.FINITE), int(Sum.BASE_SQUARE)
NONFINITE_BASE, NONFINITE_TUNED = int(Count.NONFINITE_BASE), int(Count.NONFINITE_TUNED)
NAN_BIN = BINS - 1


@helper
def weight_bin(code: Any, magnitude: Any, infinite: Any, shift: Any) -> Any:
    """Bin of a base code: its leading 15 magnitude bits, the last bin for NaN."""
    size = code & magnitude
    return np.int64(size >> shift) if size <= infinite else NAN_BIN


@helper
def count_weights(row: int, codes: Array, magnitude: Any, infinite: Any, shift: Any, totals: Totals) -> None:
    """Add base codes, shape (n,), to one row of ``weights``."""
    first, last = BINS, -1
    for i in range(codes.size):
        bin_ = weight_bin(codes[i], magnitude, infinite, shift)
        totals.weights[row, bin_] += 1
        first, last = min(first, bin_), max(last, bin_)
    widen_span(totals.span, 0, first, last)


@helper
def add_base(x: Array, y: Array, all_finite: bool, counts: Array, sums: Array) -> None:
    """Count the coordinates with finite d, of x and y of shape (n,), and add the squares of their base."""
    if all_finite:
        counts[FINITE] += x.size
        sums[BASE_SQUARE] += sum_of_squares(x)
        return
    for i in range(x.size):
        if abs(y[i] - x[i]) < np.inf:
            counts[FINITE] += 1
            sums[BASE_SQUARE] += np.float64(x[i]) * np.float64(x[i])


@helper
def take_floats(values: Array, tile: Tile) -> None:
    """Values and d of changed codes that are floats themselves."""
    x, y = tile.left.view(tile.delta.dtype), tile.right.view(tile.delta.dtype)
    for j in range(tile.delta.size):
        tile.base[j], tile.tuned[j] = x[j], y[j]
    for j in range(tile.delta.size):
        tile.delta[j] = tile.tuned[j] - tile.base[j]


@helper
def count_lost(tile: Tile, magnitude: Any, infinite: Any, shift: Any, weights: Array) -> None:
    """Histogram of the base magnitudes whose d is not finite, in the last row of ``weights``, shape (3, BINS)."""
    for j in range(tile.delta.size):
        if not abs(tile.delta[j]) < np.inf:
            weights[2, weight_bin(tile.left[j], magnitude, infinite, shift)] += 1


@helper
def measure_distances(left: Array, right: Array, magnitude: Any, distance: Array) -> None:
    """Distances of codes, shape (n,), in the monotone integer order of their format, in which +0 and -0 are one."""
    for j in range(left.size):
        x_size, y_size = np.int64(left[j] & magnitude), np.int64(right[j] & magnitude)
        x = x_size if left[j] <= magnitude else -x_size
        y = y_size if right[j] <= magnitude else -y_size
        distance[j] = np.uint64(max(x, y)) - np.uint64(min(x, y))  # wraps to the right value


@helper
def measure_wide(
    a: Array, b: Array, facts: Facts, tile: Tile, measure: Measure, totals: Totals, sums: Array, words: Array
) -> None:
    """Measure one tile; parameters and shapes as in :func:`~ckptdiff.measure.kernels.span.measure_tile`."""
    magnitude, infinite = a.dtype.type(facts.magnitude), a.dtype.type(facts.infinite)
    shift = a.dtype.type(8 * a.itemsize - 16)
    x, y = a.view(tile.delta.dtype), b.view(tile.delta.dtype)
    count_weights(0, a, magnitude, infinite, shift, totals)
    changed = find_changed(a, b, magnitude, tile)
    open_mask(tile, measure, a.size)
    found = first_of(tile, changed)
    take_floats(facts.values, found)
    totals.counts[CHANGED] += changed
    count_weights(1, found.left, magnitude, infinite, shift, totals)
    strange = count_strange(found.delta)
    nonfinite_base = count_nonfinite(a, magnitude, infinite)
    nonfinite_tuned = count_nonfinite(b, magnitude, infinite)
    if measure.native:
        totals.counts[NONFINITE_BASE] += nonfinite_base
        totals.counts[NONFINITE_TUNED] += nonfinite_tuned
    add_base(x, y, strange + nonfinite_base + nonfinite_tuned == 0, totals.counts, sums)
    if strange > 0:
        count_lost(found, magnitude, infinite, shift, totals.weights)
        found = first_of(tile, keep_finite(found))
    extremes = count_deltas(found.delta, magnitude, shift, totals)
    measure_distances(found.left, found.right, magnitude, found.distance)
    count_distances(found)
    summarise(found, extremes, measure, totals, sums)
    mask_tile(found, measure, changed, totals, sums, words)
