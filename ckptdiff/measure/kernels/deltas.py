"""Count and sum over the changed coordinates of a tile."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.bits import bits_float, float_bits, floor_log2
from ckptdiff.codes.ordered_sums import sums_of_changes
from ckptdiff.jit import helper
from ckptdiff.measure.kernels.tiles import Array, Measure, Tile, Totals
from ckptdiff.measure.partial import Count, Sum

WITHIN_ETA = int(Count.WITHIN_ETA)
DELTA, ABS_DELTA, DELTA_SQUARE = int(Sum.DELTA), int(Sum.ABS_DELTA), int(Sum.DELTA_SQUARE)
BASE_DELTA = int(Sum.BASE_DELTA)
FEW = 256
"""Distances below this have eight powers of two."""


@helper
def widen_span(span: Array, at: int, first: int, last: int) -> None:
    """Note that bins ``first`` to ``last`` of a histogram are in use."""
    span[at] = min(span[at], first)
    span[at + 1] = max(span[at + 1], last)


@helper
def count_deltas(delta: Array, magnitude: Any, shift: Any, totals: Totals) -> tuple[Any, Any]:
    """Histogram of |d|, shape (n,), for a d of 32 bits with the moments of the bits below; returns the extreme |d|."""
    smallest, largest, all_bits = magnitude, type(magnitude)(0), type(magnitude)(0)
    for j in range(delta.size):
        bits = type(magnitude)(float_bits(delta[j]) & magnitude)
        all_bits = type(magnitude)(all_bits | bits)
        smallest = bits if bits < smallest else smallest
        largest = bits if bits > largest else largest
    widen_span(totals.span, 2, int(smallest >> shift), int(largest >> shift))
    totals.max_abs[0] = max(totals.max_abs[0], np.float64(bits_float(largest)))
    for j in range(delta.size):
        totals.deltas[0, (float_bits(delta[j]) & magnitude) >> shift] += np.uint64(1)
    if shift == 16 and all_bits & 0xFFFF:  # none between bfloat16 values of about the same size
        for j in range(delta.size):
            bits = float_bits(delta[j]) & magnitude
            below = np.uint64(bits & 0xFFFF)
            if below:
                totals.deltas[1, bits >> shift] += below
                totals.deltas[2, bits >> shift] += below * below
    return bits_float(smallest), bits_float(largest)


@helper
def count_from(distance: Array, least: Any) -> Any:
    """How many distances, shape (n,), are at least so large: counted in their own dtype, so no more than it holds."""
    count = distance.dtype.type(0)
    for j in range(distance.size):
        count = distance.dtype.type(count + (distance[j] >= least))
    return int(count)


@helper
def count_distances(tile: Tile) -> None:
    """Histogram of floor(log2(distance)); ``add_ulp`` brings it into the totals.

    A pass for each power that occurs, in vectors, is cheaper than an increment for each distance while powers are few.
    """
    largest = tile.distance.dtype.type(0)
    for j in range(tile.distance.size):
        largest = tile.distance[j] if tile.distance[j] > largest else largest
    if largest >= FEW:
        for j in range(tile.distance.size):
            tile.ulp[j & 3, floor_log2(np.uint64(tile.distance[j]))] += 1
        return
    rest, power, half = tile.distance.size, 0, tile.distance.size // 2  # 16 bits do not hold the count of a whole tile
    while rest > 0:
        least = tile.distance.dtype.type(2 << power)
        larger = count_from(tile.distance[:half], least) + count_from(tile.distance[half:], least)
        tile.ulp[0, power] += rest - larger
        rest, power = larger, power + 1


@helper
def add_ulp(tile: Tile, ulp: Array) -> None:
    """Add the interleaved histograms to ``ulp`` and clear them."""
    for row in range(4):
        for k in range(64):
            ulp[k] += tile.ulp[row, k]
            tile.ulp[row, k] = 0


@helper
def count_within(delta: Array, threshold: Any) -> Any:
    """How many |delta|, shape (n,), are <= threshold."""
    count: Any = np.int32(0)
    for j in range(delta.size):
        count = np.int32(count + (abs(delta[j]) <= threshold))
    return count


@helper
def count_within_eta(tile: Tile, eta: float) -> Any:
    """How many |delta| <= eta max(|base|, |tuned|)."""
    count: Any = np.int32(0)
    for j in range(tile.delta.size):
        left, right = abs(np.float64(tile.base[j])), abs(np.float64(tile.tuned[j]))
        larger = left if left > right else right
        count = np.int32(count + (abs(np.float64(tile.delta[j])) <= eta * larger))
    return count


@helper
def add_sums(base: Array, delta: Array, sums: Array) -> None:
    """Add the sums over changed coordinates, shape (n,), in float64 to ``sums``, shape (len(Sum),)."""
    total, magnitude, square, product = sums_of_changes(base, delta)
    sums[DELTA] += total
    sums[ABS_DELTA] += magnitude
    sums[DELTA_SQUARE] += square
    sums[BASE_DELTA] += product


@helper
def summarise(tile: Tile, extremes: tuple[Any, Any], measure: Measure, totals: Totals, sums: Array) -> None:
    """Count over the changed coordinates of a tile, |d| between two extremes, and sum them into shape (len(Sum),)."""
    add_sums(tile.base, tile.delta, sums)
    for t in range(measure.thresholds.size):
        if measure.thresholds[t] >= extremes[1]:
            totals.within[t] += tile.delta.size
        elif measure.thresholds[t] >= extremes[0]:
            totals.within[t] += count_within(tile.delta, measure.thresholds[t])
    if measure.eta > 0:
        totals.counts[WITHIN_ETA] += count_within_eta(tile, measure.eta)
