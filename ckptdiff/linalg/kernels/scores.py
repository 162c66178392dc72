"""Kernels on the entries of a panel: magnitudes of base weights, and what lies above a cut in a score."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptdiff.codes.lanes import LANES
from ckptdiff.codes.ordered_sums import sum_of_squares
from ckptdiff.jit import kernel
from ckptdiff.linalg.kernels.places import SOME, places_of
from ckptdiff.measure.kernels.tiles import Array

_MAGNITUDE = np.uint32(0x7FFF_FFFF)
"""The bits of a float32 but its sign."""
_APART, _LARGE = 4, 1 << 18
"""Counts that are kept of each magnitude, and entries from which on that is worth their room."""


@kernel
def add_squares(values: Array, total: Array) -> None:
    """Add the sum of squares of a float array, shape (n,), in float64 to the first of ``total``, float64."""
    total[0] += sum_of_squares(values)


@kernel
def count_magnitudes(base: Array, delta: Array, threshold: Any, counts: Array) -> None:
    """Count entries by the leading 15 magnitude bits of the base.

    Parameters
    ----------
    base : uint32 array, shape (rows, columns)
        Codes of float32 values.
    delta : float32 array of the same shape
    threshold : float32
    counts : int64 array, shape (3, 32768)
        Added to: all entries, those with delta != 0, and those with |delta| > threshold.
    """
    # Neighbours count apart: many are of one magnitude, and each sum would wait for the one before.
    together = base.size < _LARGE
    apart = np.zeros((_APART, 0 if together else counts.shape[1]), np.int64)
    flags, places = np.zeros(SOME, np.uint8), np.empty(SOME + LANES, np.uint16)
    for i in range(base.shape[0]):
        for first in range(0, base.shape[1], SOME):
            codes, changes = base[i, first : first + SOME], delta[i, first : first + SOME]
            whole = 0 if together else codes.size - codes.size % _APART
            for j in range(0, whole, _APART):
                for k in range(_APART):
                    apart[k, (codes[j + k] >> np.uint32(16)) & np.uint32(0x7FFF)] += 1
            for j in range(whole, codes.size):
                counts[0, (codes[j] >> np.uint32(16)) & np.uint32(0x7FFF)] += 1
            for j in range(changes.size):
                flags[j] = changes[j] != 0
            flags[changes.size :] = 0
            for place in places[: places_of(flags, changes.size, places)]:
                code = (codes[place] >> np.uint32(16)) & np.uint32(0x7FFF)
                counts[1, code] += 1
                counts[2, code] += abs(changes[place]) > threshold
    for k in range(_APART):
        for code in range(apart.shape[1]):
            counts[0, code] += apart[k, code]


@kernel
def count_scores(
    scores: Array, base: Array, delta: Array, chances: Array, window: Any, low: Any, threshold: Any, counts: Array
) -> None:
    """Add what is known of each entry to the bin of its score.

    Parameters
    ----------
    scores : uint32 array, shape (n,)
        Codes of float32 values; their sign does not matter.
    base : uint32 array of the same shape
        Codes of float32 values.
    delta : float32 array of the same shape
    chances : float64 array, shape (32768,)
        By magnitude of the base, the chance to be changed under the null.
    window : (uint32, uint32)
        Score codes are shifted right by the first, and bin 0 starts at the second.
    low : (uint32, float64)
        Magnitude of the base at which the smallest end, and which share of the entries there is not among them.
    threshold : float32
    counts : float64 array, shape (bins + 1, 6)
        By bin of the score: entries, changed ones, changed above the threshold, both of these where the base is not
        among the smallest, and sum of chances. The last row takes what lies above all bins; what lies below is left
        out.
    """
    last = np.uint32(counts.shape[0] - 1)
    shift, start = window
    low_cut, not_low = low
    least, most = start << shift, (start + last) << shift
    flags, places = np.zeros(SOME, np.uint8), np.empty(SOME + LANES, np.uint16)
    inside, outside = np.empty(SOME + 1, np.uint16), np.empty(SOME + 1, np.uint16)
    changed, above, apart, above_apart, chance, beyond = 0.0, 0.0, 0.0, 0.0, 0.0, 0
    for first in range(0, scores.size, SOME):
        stop = min(first + SOME, scores.size)
        codes, weights, changes = scores[first:stop], base[first:stop], delta[first:stop]
        # Gathered first, without a branch: which scores count, nobody can guess.
        for j in range(codes.size):
            flags[j] = (codes[j] & _MAGNITUDE) >= least
        flags[codes.size :] = 0
        held, found = 0, 0
        for j in places[: places_of(flags, codes.size, places)]:
            inside[held], outside[found] = j, j
            beyond_all = (codes[j] & _MAGNITUDE) >= most
            held, found = held + (not beyond_all), found + beyond_all
        for j in inside[:held]:
            bin_ = ((codes[j] & _MAGNITUDE) >> shift) - start
            magnitude = (weights[j] >> np.uint32(16)) & np.uint32(0x7FFF)
            counts[bin_, 0] += 1.0
            counts[bin_, 5] += chances[magnitude]
            d = changes[j]
            if d != 0:
                counts[bin_, 1] += 1.0
                large = abs(d) > threshold
                counts[bin_, 2] += large
                if magnitude >= low_cut:
                    part = 1.0 if magnitude > low_cut else not_low
                    counts[bin_, 3] += part
                    counts[bin_, 4] += part if large else 0.0
        # What lies above all bins is added up in registers: in memory each sum would wait for the one before.
        beyond += found
        for j in outside[:found]:
            magnitude = (weights[j] >> np.uint32(16)) & np.uint32(0x7FFF)
            d = changes[j]
            part = 0.0 if magnitude < low_cut else 1.0 if magnitude > low_cut else not_low
            moved, large = 1.0 if d != 0 else 0.0, 1.0 if abs(d) > threshold else 0.0
            chance += chances[magnitude]
            changed += moved
            above += large
            apart += part * moved
            above_apart += part * large
    counts[last, 0] += beyond
    counts[last, 1] += changed
    counts[last, 2] += above
    counts[last, 3] += apart
    counts[last, 4] += above_apart
    counts[last, 5] += chance
