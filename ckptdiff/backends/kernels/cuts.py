"""Kernels on the histograms of one tensor: where cuts fall, and the rounding null of ``low_coverage``.

A checkpoint can hold tens of thousands of small tensors, so what is done once per tensor is compiled too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ckptdiff.backends.kernel_cache import helper, kernel, reducer
from ckptdiff.backends.kernels.bits import float_bits
from ckptdiff.backends.kernels.tiles import Array

__all__ = [
    "Gaps",
    "Groups",
    "change_chance",
    "cut_from_bottom",
    "cut_from_top",
    "find_delta_cut",
    "find_low_cut",
    "fit_null",
    "null_overlap",
    "regroup",
    "single_value",
    "within_bins",
]

NO_CHANCE = 39.0
"""Sigmas that a float64 chance does not reach."""


@kernel
def cut_from_bottom(counts: Array, first: int, last: int, rank: int) -> tuple[int, int]:
    """Bin of the ``rank``-th smallest entry, and how many lie in the bins below it.

    Parameters
    ----------
    counts : int64 array
        Histogram; only bins ``first`` to ``last`` are looked at.
    rank : int
        From 1. Past the end: (last + 1, total).
    """
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


@kernel
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
    """Find the ``rank``-th largest |d| in the histogram of a scan.

    Parameters
    ----------
    deltas : uint64 array, shape (3, BINS)
    span : int64 array, shape (4,)
    rank : int
        From 1.
    width : int
        Bits of d.

    Returns
    -------
    prefix, unknown, above, at, energy_above
        As in :class:`~ckptdiff.metrics.delta_cuts.DeltaCut`.
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
    """Find the ``rank``-th smallest |W0| in the histogram of a scan.

    Parameters
    ----------
    weights : int64 array, shape (3, bins)
    first, last : int
        Bins to look at.
    rank : int
        From 1.
    below, changed : int
        Weights below ``first``, and those of them that changed: where the search for a lower rank stopped.

    Returns
    -------
    bin, below, at, changed_below, changed_at
        As in :class:`~ckptdiff.metrics.low_cuts.LowCut`; ``at`` is 0 if there are fewer weights.
    """
    for bin_ in range(first, last + 1):
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


@kernel
def within_bins(deltas: Array, span: Array, threshold: float, width: int) -> Any:
    """Changed coordinates with |d| <= threshold, -1 if the histogram cannot tell."""
    bits: Any = np.int64(bits_at_most(threshold)) if width == 32 else np.int64(float_bits(threshold))
    cut = bits >> (width - 16)
    below: Any = 0
    for bin_ in range(span[2], min(cut, span[3] + 1)):
        below += np.int64(deltas[0, bin_])
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


@kernel
def regroup(counts: Array, groups: Groups, first: int, last: int, out: Array) -> None:
    """Add bins ``first`` to ``last`` up by group; groups past the end of ``out`` are left out."""
    run = 0
    while run < groups.numbers.size and groups.starts[run + 1] <= first:
        run += 1
    while run < groups.numbers.size and groups.starts[run] <= last:
        if groups.numbers[run] < out.size:
            start, stop = max(groups.starts[run], first), min(groups.starts[run + 1], last + 1)
            out[groups.numbers[run]] += np.uint64(count_run(counts, start, stop))
        run += 1


@helper
def exceeds(gap: float) -> float:
    """Chance that a Gaussian step exceeds ``gap`` sigmas to one side."""
    return 0.5 * math.erfc(gap * math.sqrt(0.5))


@helper
def density(gap: float) -> float:
    """Derivative, by the logarithm of sigma, of the chance that a Gaussian step exceeds ``gap`` sigmas."""
    return gap * math.exp(-0.5 * gap * gap) / math.sqrt(2.0 * math.pi)


class Gaps(NamedTuple):
    """How far each finite magnitude code of a format is from rounding to a neighbour."""

    up: Array
    """Half the gap to the next larger value, float64, shape (codes,)."""
    down: Array
    """Half the gap to the next smaller value; ascending with the code, and at most ``up``."""
    runs: Array
    """First codes of runs whose codes share both gaps, int64, and behind them the number of codes."""


@reducer
def count_run(weights: Array, start: int, stop: int) -> int:
    """Coordinates in bins ``start`` to ``stop`` - 1."""
    run, total = weights[start:stop], 0
    for j in range(run.size):  # from 0: an index that might be negative keeps the loop out of vectors
        total += run[j]
    return total


@kernel
def fit_null(weights: Array, gaps: Gaps, first: int, last: int, changed: int) -> float:
    """Sigma of the Gaussian update that changes as many coordinates after rounding, by Newton's method.

    Parameters
    ----------
    weights : int64 array, shape (bins,)
        Coordinates by magnitude code.
    gaps : Gaps
    first, last : int
        Bins in use; all of finite values.
    changed : int
        Above 0 and below the sum of ``weights``.
    """
    # A few dozen gaps, each with the coordinates above and below which it lies, stand for thousands of codes.
    steps, sizes = np.empty(2 * gaps.runs.size), np.zeros(2 * gaps.runs.size)
    top, total = -1, 0
    for run in range(gaps.runs.size - 1):
        start, stop = max(gaps.runs[run], first), min(gaps.runs[run + 1], last + 1)
        count = count_run(weights, start, stop) if start < stop else 0
        if count == 0:
            continue
        for gap in (gaps.down[start], gaps.up[start]):
            if top < 0 or gap > steps[top]:
                top += 1
                steps[top] = gap
            sizes[top] += count
        total += count
    middle, seen = 0, sizes[0]
    while seen < total:  # half of all gaps: there are two for each coordinate
        middle += 1
        seen += sizes[middle]
    low, high = math.log(steps[0]) - 60.0, math.log(steps[top]) + 60.0
    at = math.log(steps[middle])
    for _ in range(200):
        expected, slope = 0.0, 0.0
        sigma = math.exp(at)
        for gap in range(top + 1):
            if steps[gap] > NO_CHANCE * sigma:
                break
            expected += sizes[gap] * exceeds(steps[gap] / sigma)
            slope += sizes[gap] * density(steps[gap] / sigma)
        if expected < changed:
            low = at
        else:
            high = at
        step = (changed - expected) / slope if slope > 0 else math.inf
        if abs(step) <= 1e-14 * max(1.0, abs(at)) or high - low <= 1e-13 * max(1.0, abs(low)):
            break
        # Newton's step while it stays between the bounds; far off, where the slope says nothing, halve them.
        at = at + step if low < at + step < high and abs(step) < 4.0 else 0.5 * (low + high)
    return math.exp(at)


@kernel
def null_overlap(
    weights: Array, gaps: Gaps, first: int, last: int, sigma: float, ranks: Array, overlap: Array
) -> float:
    """Expected number of coordinates that a Gaussian update moves, and of those among the smallest weights.

    Parameters
    ----------
    weights, gaps, first, last
        As in ``fit_null``.
    sigma : float
    ranks : int64 array
        How many of the smallest weights, ascending.
    overlap : float64 array
        Receives one expectation per rank; ties at a cut count fractionally.

    Returns
    -------
    float
        Expected number over all coordinates.
    """
    total, below, at = 0.0, 0, 0
    for run in range(gaps.runs.size - 1):
        start, stop = max(gaps.runs[run], first), min(gaps.runs[run + 1], last + 1)
        count = count_run(weights, start, stop) if start < stop else 0
        if count == 0:
            continue
        # All of the run have one chance, so it does not matter which of them a cut leaves out.
        chance = exceeds(gaps.up[start] / sigma) + exceeds(gaps.down[start] / sigma)
        while at < ranks.size and ranks[at] <= below + count:
            overlap[at] = total + (ranks[at] - below) * chance
            at += 1
        total += count * chance
        below += count
    for rest in range(at, ranks.size):
        overlap[rest] = total
    return total


@kernel
def change_chance(gaps: Gaps, first: int, last: int, sigma: float, chances: Array) -> None:
    """Write the chance of each magnitude code ``first`` to ``last`` to change; parameters as in ``null_overlap``."""
    for code in range(first, last + 1):
        chances[code] = exceeds(gaps.up[code] / sigma) + exceeds(gaps.down[code] / sigma)
