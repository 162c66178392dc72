"""The fused kernel for compare formats of 8 and 16 bits, whose codes index a table of values."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.backends.kernel_cache import helper, kernel
from ckptdiff.backends.kernels.bits import bits_float
from ckptdiff.backends.kernels.tiles import (
    TILE,
    Array,
    Measure,
    Tile,
    Totals,
    add_ulp,
    count_deltas,
    count_distances,
    count_nonfinite,
    count_strange,
    first_of,
    keep_finite,
    mark_changed,
    mask_tile,
    positions,
    summarise,
    widen_span,
)
from ckptdiff.backends.partial import Count

__all__ = ["scan_codes"]

CHANGED, NONFINITE_TUNED = int(Count.CHANGED), int(Count.NONFINITE_TUNED)


@helper
def count_weights(codes: Array, magnitude: Any, weights: Array, span: Array) -> None:
    """Histogram of the magnitudes of all base codes."""
    smallest, largest = codes.dtype.type(0xFFFF), codes.dtype.type(0)
    for i in range(codes.size):
        code = codes.dtype.type(codes[i] & magnitude)
        smallest = code if code < smallest else smallest
        largest = code if code > largest else largest
    widen_span(span, 0, int(smallest), int(largest))
    # Four codes to a load: the loop is bound by its loads and stores.
    whole = codes.size // 4 * 4
    fours = codes[:whole].view(np.uint64)
    for i in range(fours.size):
        word = fours[i]
        weights[0, word & magnitude] += 1
        weights[0, (word >> 16) & magnitude] += 1
        weights[0, (word >> 32) & magnitude] += 1
        weights[0, (word >> 48) & magnitude] += 1
    for i in range(whole, codes.size):
        weights[0, codes[i] & magnitude] += 1


@helper
def gather(a: Array, b: Array, values: Array, tile: Tile) -> None:
    """Collect codes, values and d of the coordinates found."""
    for j in range(tile.found.size):
        at = tile.found[j]
        tile.left[j], tile.right[j] = a[at], b[at]
    if values.size == 0:  # bfloat16: a code is the upper half of its float32
        for j in range(tile.found.size):
            tile.base[j] = bits_float(np.uint32(np.uint32(tile.left[j]) << np.uint32(16)))
            tile.tuned[j] = bits_float(np.uint32(np.uint32(tile.right[j]) << np.uint32(16)))
    else:
        for j in range(tile.found.size):
            tile.base[j], tile.tuned[j] = values[tile.left[j]], values[tile.right[j]]
    for j in range(tile.found.size):
        tile.delta[j] = tile.tuned[j] - tile.base[j]


@helper
def count_into(row: int, codes: Array, magnitude: Any, weights: Array) -> None:
    """Add the magnitudes of codes to one row of ``weights``."""
    for j in range(codes.size):
        weights[row, codes[j] & magnitude] += 1


@helper
def count_lost(tile: Tile, magnitude: Any, weights: Array) -> None:
    """Histogram of the base magnitudes whose d is not finite."""
    for j in range(tile.delta.size):
        if not abs(tile.delta[j]) < np.inf:
            weights[2, tile.left[j] & magnitude] += 1


@helper
def measure_distances(left: Array, right: Array, magnitude: Any, distance: Array) -> None:
    """Distance of two codes in the monotone integer order of their format, in which +0 and -0 are one."""
    for j in range(left.size):
        x, y = np.int32(left[j]), np.int32(right[j])
        x_size, y_size = np.int32(x & magnitude), np.int32(y & magnitude)
        x_order = x_size if x <= magnitude else np.int32(-x_size)
        y_order = y_size if y <= magnitude else np.int32(-y_size)
        apart = np.int32(x_order - y_order)
        distance[j] = apart if apart > 0 else np.int32(-apart)


@kernel
def scan_codes(
    a: Array,
    b: Array,
    values: Array,
    limits: tuple[Any, Any],
    tile: Tile,
    measure: Measure,
    totals: Totals,
    words: Array,
) -> None:
    """Measure one piece of codes.

    Parameters
    ----------
    a, b : read-only uint16 array, shape (n,)
        Codes of both sides, 8-bit codes widened with zeros. Addresses are multiples of 8.
    values : read-only float32 array
        Value of each code; empty for bfloat16, which needs no table.
    limits : (uint16, uint16)
        Mask of the magnitude bits, and the first magnitude that is not finite.
    tile : Tile
        Work space.
    measure : Measure
    totals : Totals
        Added to.
    words : uint64 array, shape (ceil(n / 64),) or (0,)
        Receives the mask.
    """
    magnitude, infinite = limits
    bits = np.uint64(magnitude)
    for start in range(0, a.size, TILE):
        x, y = a[start : start + TILE], b[start : start + TILE]
        mark_changed(x, y, magnitude, tile.marks)
        count_weights(x, bits, totals.weights, totals.span)
        changed = positions(tile.marks, x.size, tile.found)
        found = first_of(tile, changed)
        gather(x, y, values, found)
        totals.counts[CHANGED] += changed
        count_into(1, found.left, bits, totals.weights)
        if count_strange(found.delta) > 0:
            count_lost(found, bits, totals.weights)
            if measure.native:  # beyond the base's own, which its histogram tells
                gained = count_nonfinite(found.right, magnitude, infinite)
                totals.counts[NONFINITE_TUNED] += gained - count_nonfinite(found.left, magnitude, infinite)
            found = first_of(tile, keep_finite(found))
        count_deltas(found.delta, np.uint32(0x7FFF_FFFF), np.uint32(16), totals)
        measure_distances(found.left, found.right, np.int32(magnitude), found.distance)
        count_distances(found)
        summarise(found, measure, totals)
        mask_tile(found, measure, changed, totals, words[start // 64 : (start + TILE) // 64])
    add_ulp(tile, totals.ulp)
