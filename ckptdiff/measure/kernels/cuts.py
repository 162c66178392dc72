"""Find where cuts fall in the histograms of one tensor, and sum bins.

A checkpoint can hold tens of thousands of small tensors, so what is done once per tensor is compiled too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.codes.bits import float_bits
from ckptdiff.jit import helper, kernel
from ckptdiff.measure.kernels.tiles import Array

_STRIDE = 64
"""Bins that are added up together in a search."""


@helper
def count_run(counts: Array, start: int, stop: int) -> int:
    """Coordinates in bins ``start`` to ``stop`` - 1 of a histogram of int64."""
    run, total = counts[start:stop], 0
    for j in range(run.size):  # from 0: an index that might be negative keeps the loop out of vectors
        total += run[j]
    return total


@kernel
def cut_from_bottom(counts: Array, first: int, last: int, rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th smallest entry, and how many lie in the bins below it; past the end: (last + 1, total)."""
    below = 0
    for bin_ in range(first, last + 1):
        if below + counts[bin_] >= rank:
            return bin_, below
        below += counts[bin_]
    return last + 1, below


@kernel
def cut_from_top(counts: Array, first: int, last: int, rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th largest entry, and how many lie in the bins above it; past the end: (first - 1, total)."""
    above = 0
    for bin_ in range(last, first - 1, -1):
        if above + counts[bin_] >= rank:
            return bin_, above
        above += counts[bin_]
    return first - 1, above


@helper
def single_value(deltas: Array, bin_: int) -> int:
    """Bits of the one |d| of 32 bits in a bin that is not empty, -1 if the bin holds several values."""
    count, total, squares = deltas[0, bin_], deltas[1, bin_], deltas[2, bin_]
    low = total // count
    # The sum of squares about a mean of ``low`` is zero: all entries are the same.
    if low * count != total or low * low * count != squares:
        return -1
    return int(np.int64(bin_) << 16 | np.int64(low))


@helper
def bin_energy(bin_: int, count: float, total: float, squares: float) -> float:
    """Sum d^2 of a bin, for a d of 32 bits."""
    exponent = bin_ >> 7
    # |d| = (lead + low) 2^(e - 150), where low are the 16 bits below the bin and lead the bits above them.
    lead = float(((bin_ & 127) << 16) + ((1 << 23) if exponent > 0 else 0))
    return math.ldexp(count * lead**2 + 2.0 * lead * total + squares, 2 * (max(exponent, 1) - 150))


@kernel
def find_delta_cut(deltas: Array, span: Array, rank: int, width: int) -> tuple[int, int, int, int, float]:
    """Find the ``rank``-th largest |d|, of ``width`` bits, in the histogram of a scan, shape (3, BINS).

    Returns prefix, unknown, above, at and energy_above of a :class:`~ckptdiff.measure.open_cuts.DeltaCut`.
    """
    above: Any = 0
    energy = 0.0
    for bin_ in range(span[3], span[2] - 1, -1):
        count: Any = np.int64(deltas[0, bin_])
        if count == 0:
            continue
        if above + count >= rank:
            value = single_value(deltas, bin_) if width == 32 else -1
            if value >= 0:
                return value, 0, above, count, energy
            return bin_, width - 16, above, count, energy
        above += count
        energy += bin_energy(bin_, float(count), float(deltas[1, bin_]), float(deltas[2, bin_]))
    return 0, 0, above, 0, energy


@kernel
def find_low_cut(
    weights: Array, first: int, last: int, rank: int, below: int, changed: int
) -> tuple[int, int, int, int, int]:
    """Find the ``rank``-th smallest |W0| in bins ``first`` to ``last`` of the histogram of a scan, shape (3, bins).

    ``below`` weights, ``changed`` of which did, lie below ``first``: where the search for a lower rank stopped. Returns
    bin, below, at, changed_below and changed_at of a :class:`~ckptdiff.measure.open_cuts.LowCut`; ``at`` is 0 if there
    are fewer weights.
    """
    # Runs of bins are added up by vectors, single bins one by one.
    start: Any = np.int64(first)
    while start + _STRIDE <= last:
        held = count_run(weights[0], start, start + _STRIDE)
        if below + held >= rank:
            break
        below += held
        changed += count_run(weights[1], start, start + _STRIDE)
        start += _STRIDE
    for bin_ in range(start, last + 1):
        count = weights[0, bin_]
        if below + count >= rank:
            return bin_, below, count, changed, weights[1, bin_]
        below += count
        changed += weights[1, bin_]
    return last + 1, below, 0, changed, 0


@helper
def bits_at_most(threshold: float) -> Any:
    """Bits of the largest float32 that does not exceed a threshold of at least 0."""
    rounded = np.float32(threshold)
    bits = float_bits(rounded)
    return bits - np.uint32(1) if np.float64(rounded) > threshold else bits


@helper
def within_bins(deltas: Array, span: Array, threshold: float, width: int) -> Any:
    """Changed coordinates with |d| <= threshold, -1 if the histogram, shape (3, BINS), cannot tell."""
    bits: Any = np.int64(bits_at_most(threshold)) if width == 32 else np.int64(float_bits(threshold))
    cut = bits >> (width - 16)
    below: Any = count_run(deltas[0].view(np.int64), span[2], min(cut, span[3] + 1))
    if deltas[0, cut] == 0:
        return below
    value = single_value(deltas, cut) if width == 32 else -1
    if value < 0:
        return -1
    if value <= bits:
        below += np.int64(deltas[0, cut])
    return below


class Groups(NamedTuple):
    """Groups that the bins of a histogram fall into."""

    starts: Array
    """First bins of runs that belong to one group, int64, and behind them the number of bins."""
    numbers: Array
    """Group of each run, int64."""


@helper
def regroup(counts: Array, groups: Groups, first: int, last: int, out: Array) -> None:
    """Add bins ``first`` to ``last``, of shape (bins,), up by group, shape (groups,); others are left out."""
    run = 0
    while run < groups.numbers.size and groups.starts[run + 1] <= first:
        run += 1
    while run < groups.numbers.size and groups.starts[run] <= last:
        if groups.numbers[run] < out.size:
            start, stop = max(groups.starts[run], first), min(groups.starts[run + 1], last + 1)
            out[groups.numbers[run]] += np.uint64(count_run(counts, start, stop))
        run += 1
